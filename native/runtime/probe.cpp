#include "probe.h"

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <functional>
#include <vector>
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "executor.h"
#include "isa.h"
#include "thread_pool.h"

namespace isotherm {
namespace {

// Tells the compiler that a register is read and changed: no product is hoisted out of a loop, no sum is dropped.
#if defined(__x86_64__)
#define ISOTHERM_TOUCH_VECTOR(v) __asm__ volatile("" : "+v"(v))
#elif defined(__aarch64__)
#define ISOTHERM_TOUCH_VECTOR(v) __asm__ volatile("" : "+w"(v))
#endif
#define ISOTHERM_TOUCH_WORD(v) __asm__ volatile("" : "+r"(v))

constexpr size_t kPieceBytes = size_t{1} << 18;  // read between two looks at the clock
constexpr int kDots = 4608;                      // the same for dot products; a multiple of 48

struct DotProbe {
  void (*run)();  // kDots multiplications of a vector
  int bytes;      // products of bytes in one
};

void dot_scalar() {
  int32_t sums[4] = {}, a = 200;
  for (int i = 0; i < kDots; i += 4)
    for (int32_t& sum : sums) {
      ISOTHERM_TOUCH_WORD(a);
      sum += a * -100;
      ISOTHERM_TOUCH_WORD(sum);
    }
}

#if defined(__x86_64__)
#define AVX2 __attribute__((target("avx2")))
#define AVXVNNI __attribute__((target("avx2,avxvnni")))
#define AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")))

AVX2 void dot_avx2() {
  const __m256i b = _mm256_set1_epi8(-100), ones = _mm256_set1_epi16(1);
  __m256i a = _mm256_set1_epi8(100), sums[8] = {};
  for (int i = 0; i < kDots; i += 8)
    for (__m256i& sum : sums) {
      ISOTHERM_TOUCH_VECTOR(a);
      sum = _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(a, b), ones));
      ISOTHERM_TOUCH_VECTOR(sum);
    }
}

AVXVNNI void dot_avxvnni() {
  const __m256i a = _mm256_set1_epi8(100), b = _mm256_set1_epi8(-100);
  __m256i sums[12] = {};  // a dot takes some 5 cycles, and two start in each
  for (int i = 0; i < kDots; i += 12)
    for (__m256i& sum : sums) {
      sum = _mm256_dpbusd_avx_epi32(sum, a, b);
      ISOTHERM_TOUCH_VECTOR(sum);
    }
}

AVX512 void dot_avx512() {
  const __m512i a = _mm512_set1_epi8(100), b = _mm512_set1_epi8(-100);
  __m512i sums[16] = {};  // a dot takes some 4 cycles, and up to two start in each
  for (int i = 0; i < kDots; i += 16)
    for (__m512i& sum : sums) {
      sum = _mm512_dpbusd_epi32(sum, a, b);
      ISOTHERM_TOUCH_VECTOR(sum);
    }
}
#undef AVX2
#undef AVXVNNI
#undef AVX512
#elif defined(__aarch64__)
__attribute__((target("arch=armv8.2-a+dotprod"))) void dot_neon() {
  const int8x16_t a = vdupq_n_s8(100), b = vdupq_n_s8(-100);
  int32x4_t sums[16] = {};  // a dot takes some 3 cycles, and up to four start in each
  for (int i = 0; i < kDots; i += 16)
    for (int32x4_t& sum : sums) {
      sum = vdotq_s32(sum, a, b);
      ISOTHERM_TOUCH_VECTOR(sum);
    }
}

__attribute__((target("arch=armv8.2-a+dotprod+i8mm"))) void dot_neon_i8mm() {
  const uint8x16_t a = vdupq_n_u8(200);
  const int8x16_t b = vdupq_n_s8(-100);
  int32x4_t sums[16] = {};
  for (int i = 0; i < kDots; i += 16)
    for (int32x4_t& sum : sums) {
      sum = vusdotq_s32(sum, a, b);
      ISOTHERM_TOUCH_VECTOR(sum);
    }
}
#endif

DotProbe dot_probe([[maybe_unused]] const std::string& isa) {
#if defined(__x86_64__)
  if (isa == "avx512") return {dot_avx512, 64};
  if (isa == "avxvnni") return {dot_avxvnni, 32};
  if (isa == "avx2") return {dot_avx2, 32};
#elif defined(__aarch64__)
  if (isa == "neon_i8mm") return {dot_neon_i8mm, 16};
  if (isa == "neon") return {dot_neon, 16};
#endif
  return {dot_scalar, 1};
}

// work(thread) does a small piece and returns its size; all threads repeat it until a round is over.
double best_rate(ThreadPool& pool, int num_rounds, double round_s, const std::function<size_t(int)>& work) {
  using Clock = std::chrono::steady_clock;
  struct alignas(64) Count {
    size_t done;
  };
  std::vector<Count> counts(static_cast<size_t>(pool.num_threads()));
  double best = 0;
  for (int round = 0; round < num_rounds; round++) {
    const auto start = Clock::now();
    const auto elapsed_s = [&] { return std::chrono::duration<double>(Clock::now() - start).count(); };
    pool.run([&](int thread) {
      size_t done = 0;
      do done += work(thread);
      while (elapsed_s() < round_s);
      counts[thread].done = done;
    });
    const double seconds = elapsed_s();
    size_t total = 0;
    for (const Count& count : counts) total += count.done;
    best = std::max(best, static_cast<double>(total) / seconds);
  }
  return best;
}

}  // namespace

double measure_read(const std::string& isa, int num_threads, size_t buffer_bytes, int num_rounds, double round_s) {
  const KernelTable& kernels = *find_table(isa);
  const size_t num_pieces = std::max<size_t>(buffer_bytes / kPieceBytes / num_threads, 1);  // of one thread
  const Arena arena(num_pieces * num_threads * kPieceBytes);
  struct alignas(64) Stream {
    uint8_t* data;
    size_t next = 0;
  };
  std::vector<Stream> streams(static_cast<size_t>(num_threads));
  ThreadPool pool(num_threads);
  pool.run([&](int thread) {  // each thread touches its own share first, so that it lies near it
    streams[thread].data = arena.as<uint8_t>() + thread * num_pieces * kPieceBytes;
    std::memset(streams[thread].data, 1, num_pieces * kPieceBytes);
  });
  return best_rate(pool, num_rounds, round_s, [&](int thread) {
    Stream& stream = streams[thread];
    kernels.read_lines(stream.data + stream.next * kPieceBytes, kPieceBytes);
    stream.next = (stream.next + 1) % num_pieces;
    return kPieceBytes;
  });
}

double measure_int8(const std::string& isa, int num_threads, int num_rounds, double round_s) {
  const DotProbe dot = dot_probe(isa);
  const size_t ops = size_t{2} * kDots * dot.bytes;
  ThreadPool pool(num_threads);
  return best_rate(pool, num_rounds, round_s, [&](int) {
    dot.run();
    return ops;
  });
}

}  // namespace isotherm
