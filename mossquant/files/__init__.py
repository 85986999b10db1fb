# SPDX-License-Identifier: Apache-2.0
"""Files of any kind: outputs that appear whole or not at all, JSON, YAML, room on the disk."""
