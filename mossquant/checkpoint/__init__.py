# SPDX-License-Identifier: Apache-2.0
"""Models on disk: full precision and quantized, with the files that they are made of."""
