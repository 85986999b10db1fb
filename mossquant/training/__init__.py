# SPDX-License-Identifier: Apache-2.0
"""Training a MossNet from text."""
