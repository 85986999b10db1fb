# SPDX-License-Identifier: Apache-2.0
"""The native target: a .moss, the C library that runs it, and reading its weights back."""
