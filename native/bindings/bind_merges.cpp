// Merges of byte-level BPE for Python: texts come in as UTF-8, words are merged without the GIL.
#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string_view.h>
#include <nanobind/stl/vector.h>

#include <optional>
#include <stdexcept>
#include <string>
#include <utility>

#include "../runtime/merges.h"

namespace nb = nanobind;
using namespace isotherm;

namespace {

constexpr Py_ssize_t kShownChars = 80;  // of a merge in an error

// Raises TypeError for what is no str, UnicodeEncodeError for a lone surrogate.
TextList texts_of(const nb::sequence& strings) {
  TextList texts;
  for (const nb::handle text : strings) {
    // not AsUTF8AndSize, which would leave a copy in the string for as long as it lives
    const nb::object bytes = nb::steal(PyUnicode_AsUTF8String(text.ptr()));
    if (!bytes) throw nb::python_error();
    texts.add({PyBytes_AsString(bytes.ptr()), static_cast<size_t>(PyBytes_Size(bytes.ptr()))});
  }
  return texts;
}

void construct(MergeTable* self, const TokenIndex& tokens, const nb::sequence& merges, const nb::sequence& byte_texts,
               bool takes_words) {
  const TextList listed = texts_of(byte_texts);
  std::array<std::string, 256> texts;
  if (listed.size() != texts.size()) throw std::invalid_argument("byte_texts: one for each of 256 bytes");
  for (size_t byte = 0; byte < texts.size(); byte++) texts[byte] = listed[byte];
  try {
    new (self) MergeTable(tokens, texts_of(merges), std::move(texts), takes_words);
  } catch (const BadMerge& bad) {
    const nb::object start = nb::steal(PyUnicode_Substring(nb::object(merges[bad.index]).ptr(), 0, kShownChars));
    if (!start) throw nb::python_error();
    const std::string shown = nb::repr(start).c_str();
    throw nb::value_error(("merge " + std::to_string(bad.index) + ", " + shown + ", " + bad.reason).c_str());
  }
}

std::vector<int32_t> encode(const MergeTable& table, const nb::sequence& words) {
  const TextList texts = texts_of(words);
  const nb::gil_scoped_release nogil;
  std::vector<int32_t> ids;
  for (size_t i = 0; i < texts.size(); i++) table.encode(texts[i], ids);
  return ids;
}

}  // namespace

void bind_merges(nb::module_& m) {
  nb::class_<TokenIndex>(m, "TokenIndex")
      .def(
          "__init__", [](TokenIndex* self, const nb::sequence& texts) { new (self) TokenIndex(texts_of(texts)); },
          nb::arg("texts"))
      .def_prop_ro("num_repeats", &TokenIndex::num_repeats)
      .def(
          "find",
          [](const TokenIndex& self, std::string_view text) {
            const int32_t id = self.find(text);
            return id < 0 ? std::nullopt : std::optional(id);
          },
          nb::arg("text"));
  nb::class_<MergeTable>(m, "MergeTable")
      .def("__init__", &construct, nb::arg("tokens"), nb::arg("merges"), nb::arg("byte_texts"), nb::arg("takes_words"),
           nb::keep_alive<1, 2>())
      .def("encode", &encode, nb::arg("words"));
}
