// SPDX-License-Identifier: Apache-2.0

#include <cstdio>

namespace moss_tests {
bool test_scan();
bool test_conv();
bool test_linear();
bool test_rms_norm();
bool test_mixer();
}  // namespace moss_tests

int main() {
  const struct {
    const char* name;
    bool (*run)();
  } tests[] = {
      {"scan", moss_tests::test_scan},
      {"conv", moss_tests::test_conv},
      {"linear", moss_tests::test_linear},
      {"rms_norm", moss_tests::test_rms_norm},
      {"mixer", moss_tests::test_mixer},
  };
  bool passed = true;
  for (const auto& test : tests) {
    const bool own = test.run();
    std::printf("%s %s\n", test.name, own ? "passed" : "FAILED");
    passed = passed && own;
  }
  return passed ? 0 : 1;
}
