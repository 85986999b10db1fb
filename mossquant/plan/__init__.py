# SPDX-License-Identifier: Apache-2.0
"""What is asked for, what that means for every tensor of a model, and what every target can hold."""
