# SPDX-License-Identifier: Apache-2.0
"""What is shown: tables, the demo and its picture."""
