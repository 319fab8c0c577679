// The loops of reading a model file that Python is too slow for: over a quarter of a million strings.
#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>

#include <algorithm>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace nb = nanobind;

namespace {

constexpr size_t kLengthBytes = 8;
// Strings are decoded a block at a time and then cut apart, which takes less time than decoding each by itself.
constexpr size_t kBlockBytes = 1 << 14;

bool starts_character(char byte) { return (byte & 0xC0) != 0x80; }

struct Block {
  std::string bytes;
  std::vector<Py_ssize_t> ends;  // of each string, in characters if all is UTF-8
};

// As many strings as make a block, but at most `count`, and how many bytes of `data` they take.
size_t gather(std::string_view data, size_t count, size_t max_bytes, Block& block) {
  block.bytes.clear();
  block.ends.clear();
  size_t start = 0;
  Py_ssize_t num_chars = 0;
  while (block.ends.size() < count && start < kBlockBytes && data.size() - start >= kLengthBytes) {
    uint64_t length = 0;
    for (size_t byte = kLengthBytes; byte-- > 0;) length = length << 8 | static_cast<unsigned char>(data[start + byte]);
    if (length > max_bytes || length > data.size() - start - kLengthBytes) break;
    const std::string_view text = data.substr(start + kLengthBytes, length);
    if (!text.empty() && !starts_character(text[0])) break;  // no character may lie in two strings
    num_chars += std::count_if(text.begin(), text.end(), starts_character);
    block.bytes += text;
    block.ends.push_back(num_chars);
    start += kLengthBytes + text.size();
  }
  return start;
}

// Appends to `strings` until it has `count`, from offset `start` on, and gives the offset where the next one starts.
// A string is a little-endian u64 length and that many bytes of UTF-8. Stops early, less than a block before one that
// is too long, cut off or no UTF-8.
size_t read_strings(nb::bytes buffer, size_t start, size_t count, size_t max_bytes, nb::list strings) {
  std::string_view data(buffer.c_str(), buffer.size());
  data.remove_prefix(std::min(start, data.size()));
  Block block;
  for (size_t found = strings.size(); found < count; found += block.ends.size()) {
    const size_t num_bytes = gather(data, count - found, max_bytes, block);
    const nb::object all =
        nb::steal(PyUnicode_DecodeUTF8(block.bytes.data(), static_cast<Py_ssize_t>(block.bytes.size()), "strict"));
    if (!all && !PyErr_ExceptionMatches(PyExc_UnicodeDecodeError)) throw nb::python_error();
    if (!all) PyErr_Clear();
    if (!all || block.ends.empty()) break;
    Py_ssize_t first = 0;
    for (const Py_ssize_t end : block.ends) {
      const nb::object text = nb::steal(PyUnicode_Substring(all.ptr(), first, end));
      if (!text) throw nb::python_error();
      strings.append(text);
      first = end;
    }
    data.remove_prefix(num_bytes);
  }
  return buffer.size() - data.size();
}

bool is_pair(nb::handle text) {
  const Py_ssize_t length = PyUnicode_GetLength(text.ptr());
  if (length < 0) throw nb::python_error();
  const Py_ssize_t space = PyUnicode_FindChar(text.ptr(), ' ', 0, length, 1);
  return space > 0 && space + 1 < length && PyUnicode_FindChar(text.ptr(), ' ', space + 1, length, 1) == -1;
}

std::optional<size_t> find_unpaired(const nb::sequence& texts) {
  size_t index = 0;
  for (const nb::handle text : texts) {
    if (!is_pair(text)) return index;
    index++;
  }
  return std::nullopt;
}

}  // namespace

void bind_strings(nb::module_& m) {
  m.def("read_strings", &read_strings, nb::arg("buffer"), nb::arg("start"), nb::arg("count"), nb::arg("max_bytes"),
        nb::arg("strings"));
  m.def("find_unpaired", &find_unpaired, nb::arg("texts"));
}
