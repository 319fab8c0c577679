// The one loop of reading a model file that Python is too slow for: a quarter of a million length-prefixed strings.
#include <nanobind/nanobind.h>

#include <cstring>

namespace nb = nanobind;

namespace {

// Up to `count` strings, each a little-endian u64 length and that many bytes of UTF-8, from offset `start` on; and
// where the next one starts. Stops early before the first that is too long, cut off or no UTF-8.
nb::tuple read_strings(nb::bytes buffer, size_t start, size_t count, size_t max_bytes) {
  const char* data = buffer.c_str();
  const size_t size = buffer.size();
  nb::list strings;
  for (size_t i = 0; i < count && start <= size && size - start >= 8; i++) {
    uint64_t length = 0;
    for (int byte = 7; byte >= 0; byte--) length = length << 8 | static_cast<unsigned char>(data[start + byte]);
    if (length > max_bytes || length > size - start - 8) break;
    PyObject* text = PyUnicode_DecodeUTF8(data + start + 8, static_cast<Py_ssize_t>(length), "strict");
    if (!text) {
      if (!PyErr_ExceptionMatches(PyExc_UnicodeDecodeError)) throw nb::python_error();
      PyErr_Clear();
      break;
    }
    strings.append(nb::steal(text));
    start += 8 + static_cast<size_t>(length);
  }
  return nb::make_tuple(strings, start);
}

}  // namespace

void bind_strings(nb::module_& m) {
  m.def("read_strings", &read_strings, nb::arg("buffer"), nb::arg("start"), nb::arg("count"), nb::arg("max_bytes"),
        "Length-prefixed UTF-8 strings and the offset after them; stops early before the first that is not sound.");
}
