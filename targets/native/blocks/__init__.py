# SPDX-License-Identifier: Apache-2.0
"""libmoss block by block (`runtime/moss_blocks.h`): the calls that a model consists of, what they take, making them."""
