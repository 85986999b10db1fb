# SPDX-License-Identifier: Apache-2.0
"""A .pte whose blocks run in our own kernels, those of libmoss: operators, what is lowered to them, reading it back."""
