// SPDX-License-Identifier: Apache-2.0

#include <cstdio>

namespace moss_tests {
bool test_scan();
bool test_conv();
}  // namespace moss_tests

int main() {
  const bool scan = moss_tests::test_scan(), conv = moss_tests::test_conv();
  std::printf("scan %s, conv %s\n", scan ? "passed" : "FAILED", conv ? "passed" : "FAILED");
  return scan && conv ? 0 : 1;
}
