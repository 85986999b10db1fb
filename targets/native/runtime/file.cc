// SPDX-License-Identifier: Apache-2.0

#include "file.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <stdexcept>
#include <string>
#include <string_view>

#include "json.h"

namespace moss {
namespace {

constexpr std::int64_t kLargestHeader = 64 << 20;             // bytes
constexpr std::int64_t kLargestFile = std::int64_t{1} << 50;  // bytes; a whole number as JSON has them

}  // namespace

MappedFile::MappedFile(const std::string& path) {
  const int file = open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (file < 0) throw std::runtime_error(std::strerror(errno));
  struct stat about = {};
  const bool known = fstat(file, &about) == 0 && S_ISREG(about.st_mode);
  size_ = known ? about.st_size : 0;
  void* const mapped = size_ > 8 ? mmap(nullptr, static_cast<std::size_t>(size_), PROT_READ, MAP_SHARED, file, 0)
                                 : MAP_FAILED;
  close(file);
  if (!known) throw std::runtime_error("it is not a file");
  if (size_ <= 8) throw std::runtime_error("it is empty, or is cut short");
  if (mapped == MAP_FAILED) throw std::runtime_error("it cannot be mapped");
  data_ = static_cast<std::uint8_t*>(mapped);
  try {
    read_header();
  } catch (...) {
    munmap(data_, static_cast<std::size_t>(size_));
    throw;
  }
}

MappedFile::~MappedFile() { munmap(data_, static_cast<std::size_t>(size_)); }

void MappedFile::read_header() {
  std::uint64_t length = 0;
  for (int i = 7; i >= 0; --i) length = length << 8 | data_[i];  // little-endian
  if (length > static_cast<std::uint64_t>(kLargestHeader) || length > static_cast<std::uint64_t>(size_ - 8)) {
    throw std::runtime_error("it is no safetensors file, or is cut short");
  }
  const Json header = parse_json({reinterpret_cast<const char*>(data_ + 8), static_cast<std::size_t>(length)});
  const std::int64_t begin = 8 + static_cast<std::int64_t>(length), most = size_ - begin;
  for (const auto& [name, entry] : header.object) {
    if (name == "__metadata__") {
      for (const auto& [key, value] : entry.object) metadata_[key] = value.text(key);
      continue;
    }
    const std::vector<Json>& offsets = entry.at("data_offsets").array;
    if (offsets.size() != 2) throw std::runtime_error("the offsets of " + name + " must be two");
    const std::int64_t first = offsets[0].integer("an offset of " + name, 0, kLargestFile);
    const std::int64_t end = offsets[1].integer("an offset of " + name, first, kLargestFile);
    if (end > most) {
      throw std::runtime_error(name + " ends " + std::to_string(end - most) + " bytes behind the file: it is cut short");
    }
    tensors_[name] = {data_ + begin + first, end - first};
  }
}

Bytes MappedFile::tensor(const std::string& name) const {
  const auto found = tensors_.find(name);
  if (found == tensors_.end()) throw std::runtime_error("it has no tensor " + name);
  return found->second;
}

}  // namespace moss
