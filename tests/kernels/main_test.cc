// SPDX-License-Identifier: Apache-2.0
//
// Runs the C++ kernel tests and prints which kernels they tested, and which this machine cannot run.
//
//     kernels_tests [isa...]    given instruction sets (NAMES.md), fails unless kernels of just these were tested

#include <cstdio>
#include <set>

#include "compare.h"

namespace moss_tests {
bool test_scan();
bool test_conv();
bool test_linear();
bool test_linear_integers();
bool test_rms_norm();
bool test_mixer();

namespace {

std::string isa_of(const std::string& name) { return name.substr(name.rfind('_') + 1); }

// One line an instruction set; returns the sets.
std::set<std::string> print_met(const char* what, bool tested) {
  std::map<std::string, std::string> lines;
  std::set<std::string> isas;
  for (const auto& [name, here] : kernels_met()) {
    if (here == tested) lines[isa_of(name)] += " " + name;
  }
  for (const auto& [isa, names] : lines) {
    std::printf("%s %s:%s\n", what, isa.c_str(), names.c_str());
    isas.insert(isa);
  }
  return isas;
}

}  // namespace
}  // namespace moss_tests

int main(int argc, char** argv) {
  const struct {
    const char* name;
    bool (*run)();
  } tests[] = {
      {"scan", moss_tests::test_scan},
      {"conv", moss_tests::test_conv},
      {"linear", moss_tests::test_linear},
      {"linear_integers", moss_tests::test_linear_integers},
      {"rms_norm", moss_tests::test_rms_norm},
      {"mixer", moss_tests::test_mixer},
  };
  bool passed = true;
  for (const auto& test : tests) {
    const bool own = test.run();
    std::printf("%s %s\n", test.name, own ? "passed" : "FAILED");
    passed = passed && own;
  }
  const auto tested = moss_tests::print_met("tested", true);
  moss_tests::print_met("not on this machine", false);
  if (argc > 1 && tested != std::set<std::string>(argv + 1, argv + argc)) {
    std::printf("FAILED: the instruction sets tested are not those of the command line\n");
    passed = false;
  }
  return passed ? 0 : 1;
}
