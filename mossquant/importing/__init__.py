# SPDX-License-Identifier: Apache-2.0
"""Bringing in checkpoints of other projects."""
