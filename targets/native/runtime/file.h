// SPDX-License-Identifier: Apache-2.0
//
// A safetensors file, mapped: its tensors as ranges of bytes, every one of which lies inside the file.

#ifndef MOSS_NATIVE_FILE_H_
#define MOSS_NATIVE_FILE_H_

#include <cstdint>
#include <map>
#include <string>

namespace moss {

struct Bytes {
  const std::uint8_t* data;
  std::int64_t size;
};

class MappedFile {
 public:
  // Throws std::runtime_error: it cannot be read, is no safetensors file, or is cut short.
  explicit MappedFile(const std::string& path);
  ~MappedFile();
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;

  std::int64_t size() const { return size_; }
  // Entries of `__metadata__`.
  const std::map<std::string, std::string>& metadata() const { return metadata_; }
  // By name; throws std::runtime_error where there is none.
  Bytes tensor(const std::string& name) const;

 private:
  void read_header();

  std::uint8_t* data_ = nullptr;
  std::int64_t size_ = 0;
  std::map<std::string, std::string> metadata_;
  std::map<std::string, Bytes> tensors_;
};

}  // namespace moss

#endif  // MOSS_NATIVE_FILE_H_
