// SPDX-License-Identifier: Apache-2.0
//
// JSON as far as the header of a .moss needs it (RFC 8259): a value and a reader.

#ifndef MOSS_NATIVE_JSON_H_
#define MOSS_NATIVE_JSON_H_

#include <cstdint>
#include <map>
#include <string>
#include <string_view>
#include <vector>

namespace moss {

struct Json {
  enum class Kind { null, boolean, number, string, array, object };

  Kind kind = Kind::null;
  bool boolean = false;
  double number = 0;
  std::string string;
  std::vector<Json> array;
  std::map<std::string, Json> object;

  // Each throws std::runtime_error, which names `what`, where the value is of another kind or out of range.
  const Json& at(const std::string& key) const;
  std::int64_t integer(const std::string& what, std::int64_t least, std::int64_t most) const;
  double real(const std::string& what) const;
  bool truth(const std::string& what) const;
  const std::string& text(const std::string& what) const;
};

// Throws std::runtime_error where `text` is no JSON, or nested deeper than 32.
Json parse_json(std::string_view text);

}  // namespace moss

#endif  // MOSS_NATIVE_JSON_H_
