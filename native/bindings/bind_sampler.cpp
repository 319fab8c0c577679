// Sampler for Python. isotherm.engine.sampling checks the rules; here the arrays are checked.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <stdexcept>

#include "../runtime/sampler.h"

namespace nb = nanobind;
using namespace isotherm;

namespace {

using Logits = nb::ndarray<const float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Bitmask = nb::ndarray<const uint32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using TokenIds = nb::ndarray<const int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

// (token id, its log-probability, the likeliest as (id, log-probability)), or None: every token is banned
nb::object sample(Sampler& sampler, Logits logits, TokenIds history, uint64_t position, uint64_t sequence,
                  std::optional<Bitmask> allowed) {
  const auto known = [&](int32_t id) { return 0 <= id && id < sampler.vocab_size(); };
  if (logits.size() != static_cast<size_t>(sampler.vocab_size())) throw std::invalid_argument("logits: one row");
  for (size_t i = 0; i < history.size(); i++)
    if (!known(history.data()[i])) throw std::invalid_argument("history: an id outside the vocabulary");
  if (allowed && allowed->size() != (logits.size() + 31) / 32)
    throw std::invalid_argument("allowed: a bit for each token, in words of 32");
  std::optional<SampledToken> token;
  {
    nb::gil_scoped_release nogil;
    token = sampler.sample(logits.data(), history.data(), history.size(), position, sequence,
                           allowed ? allowed->data() : nullptr);
  }
  if (!token) return nb::none();
  return nb::make_tuple(token->id, token->logprob, token->logprobs);
}

// (token id, its log-probability)
nb::object sample_short(Sampler& sampler, Logits logits, TokenIds ids, std::pair<float, double> peak_and_total,
                        uint64_t position, uint64_t sequence) {
  const float *first = logits.data(), *last = first + logits.size();
  const auto known = [&](int32_t id) { return 0 <= id && id < sampler.vocab_size(); };
  if (ids.size() != logits.size() || logits.size() > static_cast<size_t>(sampler.vocab_size()))
    throw std::invalid_argument("shortlist: a logit for each id");
  if (!std::all_of(ids.data(), ids.data() + ids.size(), known)) throw std::invalid_argument("shortlist: ids");
  const auto [peak, total] = peak_and_total;
  if (std::find(first, last, peak) == last) throw std::invalid_argument("shortlist: the peak is not in it");
  const Shortlist list{ids.data(), first, ids.size(), peak, total};
  const SampledToken token = sampler.sample_short(list, position, sequence);
  return nb::make_tuple(token.id, token.logprob);
}

}  // namespace

void bind_sampler(nb::module_& m) {
  nb::exception<BadLogits>(m, "BadLogits", PyExc_AssertionError);
  nb::class_<SamplingRules>(m, "SamplingRules")
      .def(nb::init<>())
      .def_rw("temperature", &SamplingRules::temperature)
      .def_rw("top_k", &SamplingRules::top_k)
      .def_rw("top_p", &SamplingRules::top_p)
      .def_rw("min_p", &SamplingRules::min_p)
      .def_rw("repeat_penalty", &SamplingRules::repeat_penalty)
      .def_rw("presence_penalty", &SamplingRules::presence_penalty)
      .def_rw("frequency_penalty", &SamplingRules::frequency_penalty)
      .def_rw("penalty_tokens", &SamplingRules::penalty_tokens)
      .def_rw("logit_bias", &SamplingRules::logit_bias)
      .def_rw("seed", &SamplingRules::seed)
      .def_rw("num_logprobs", &SamplingRules::num_logprobs);
  nb::class_<Sampler>(m, "Sampler")
      .def(
          "__init__",
          [](Sampler* self, const SamplingRules& rules, int vocab_size) {
            if (vocab_size <= 0) throw std::invalid_argument("vocab_size must be positive");
            for (const auto& [id, bias] : rules.logit_bias)
              if (id < 0 || id >= vocab_size) throw std::invalid_argument("logit_bias: an id outside the vocabulary");
            new (self) Sampler(rules, vocab_size);
          },
          nb::arg("rules"), nb::arg("vocab_size"))
      .def("sample", &sample, nb::arg("logits"), nb::arg("history"), nb::arg("position"), nb::arg("sequence"),
           nb::arg("allowed") = nb::none())
      .def("sample_short", &sample_short, nb::arg("logits"), nb::arg("ids"), nb::arg("peak_and_total"),
           nb::arg("position"), nb::arg("sequence"))
      .def_prop_ro("num_needed", &Sampler::num_needed)
      .def_prop_ro("busy_s", &Sampler::busy_s);
}
