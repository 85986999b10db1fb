// SPDX-License-Identifier: Apache-2.0

#include "json.h"

#include <charconv>
#include <cmath>
#include <stdexcept>

namespace moss {
namespace {

constexpr int kDeepest = 32;

class Reader {
 public:
  explicit Reader(std::string_view text) : text_(text) {}

  Json whole() {
    const Json value = read(0);
    skip_space();
    if (at_ != text_.size()) fail();
    return value;
  }

 private:
  [[noreturn]] void fail() const {
    throw std::runtime_error("its header is not JSON at byte " + std::to_string(at_) + " of " +
                             std::to_string(text_.size()));
  }

  char peek() const { return at_ < text_.size() ? text_[at_] : '\0'; }

  void skip_space() {
    while (peek() == ' ' || peek() == '\n' || peek() == '\t' || peek() == '\r') ++at_;
  }

  bool take(std::string_view word) {
    if (text_.substr(at_, word.size()) != word) return false;
    at_ += word.size();
    return true;
  }

  void want(char character) {
    skip_space();
    if (peek() != character || at_ == text_.size()) fail();
    ++at_;
  }

  Json read(int depth) {
    if (depth > kDeepest) fail();
    skip_space();
    Json value;
    switch (peek()) {
      case '{':
        value.kind = Json::Kind::object;
        items('}', [&] {
          skip_space();
          const std::string key = string();
          want(':');
          value.object[key] = read(depth + 1);
        });
        return value;
      case '[':
        value.kind = Json::Kind::array;
        items(']', [&] { value.array.push_back(read(depth + 1)); });
        return value;
      case '"':
        value.kind = Json::Kind::string;
        value.string = string();
        return value;
      default:
        break;
    }
    if (take("null")) return value;
    if (take("true") || take("false")) {
      value.kind = Json::Kind::boolean;
      value.boolean = text_[at_ - 2] == 'u';
      return value;
    }
    value.kind = Json::Kind::number;
    const char* const end = text_.data() + text_.size();
    const auto [rest, error] = std::from_chars(text_.data() + at_, end, value.number);
    if (error != std::errc() || !std::isfinite(value.number)) fail();
    at_ = static_cast<std::size_t>(rest - text_.data());
    return value;
  }

  // What stands between two brackets, of which the first is next.
  template <typename Item>
  void items(char closing, const Item& item) {
    ++at_;
    skip_space();
    if (peek() == closing) {
      ++at_;
      return;
    }
    for (;;) {
      item();
      skip_space();
      if (peek() == closing) break;
      want(',');
    }
    ++at_;
  }

  std::string string() {
    want('"');
    std::string value;
    for (;;) {
      if (at_ == text_.size()) fail();
      const char character = text_[at_++];
      if (character == '"') return value;
      if (static_cast<unsigned char>(character) < 0x20) fail();
      if (character != '\\') {
        value += character;
        continue;
      }
      const char escaped = peek();
      ++at_;
      switch (escaped) {
        case '"':
        case '\\':
        case '/':
          value += escaped;
          break;
        case 'b':
          value += '\b';
          break;
        case 'f':
          value += '\f';
          break;
        case 'n':
          value += '\n';
          break;
        case 'r':
          value += '\r';
          break;
        case 't':
          value += '\t';
          break;
        case 'u':
          append_unit(&value);
          break;
        default:
          fail();
      }
    }
  }

  // A code unit as UTF-8, each half of a surrogate pair by itself: names that the runtime asks for are ASCII.
  void append_unit(std::string* value) {
    unsigned unit = 0;
    const char* const begin = text_.data() + at_;
    if (text_.size() - at_ < 4) fail();
    const auto [rest, error] = std::from_chars(begin, begin + 4, unit, 16);
    if (error != std::errc() || rest != begin + 4) fail();
    at_ += 4;
    if (unit < 0x80) {
      *value += static_cast<char>(unit);
    } else if (unit < 0x800) {
      *value += static_cast<char>(0xc0 | unit >> 6);
      *value += static_cast<char>(0x80 | (unit & 0x3f));
    } else {
      *value += static_cast<char>(0xe0 | unit >> 12);
      *value += static_cast<char>(0x80 | (unit >> 6 & 0x3f));
      *value += static_cast<char>(0x80 | (unit & 0x3f));
    }
  }

  std::string_view text_;
  std::size_t at_ = 0;
};

}  // namespace

const Json& Json::at(const std::string& key) const {
  const auto found = object.find(key);
  if (found == object.end()) throw std::runtime_error("its header has no '" + key + "'");
  return found->second;
}

std::int64_t Json::integer(const std::string& what, std::int64_t least, std::int64_t most) const {
  const bool whole = kind == Kind::number && number == std::floor(number);
  if (whole && number >= static_cast<double>(least) && number <= static_cast<double>(most)) {
    return static_cast<std::int64_t>(number);
  }
  throw std::runtime_error(what + " must be a whole number in " + std::to_string(least) + " .. " +
                           std::to_string(most));
}

double Json::real(const std::string& what) const {
  if (kind == Kind::number) return number;
  throw std::runtime_error(what + " must be a number");
}

bool Json::truth(const std::string& what) const {
  if (kind == Kind::boolean) return boolean;
  throw std::runtime_error(what + " must be true or false");
}

const std::string& Json::text(const std::string& what) const {
  if (kind == Kind::string) return string;
  throw std::runtime_error(what + " must be a string");
}

Json parse_json(std::string_view text) { return Reader(text).whole(); }

}  // namespace moss
