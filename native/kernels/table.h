// What one instruction set offers: plain functions over plain data. The binding checks, the kernel computes.
#pragma once
#include <cstddef>
#include <cstdint>

namespace isotherm {

constexpr int kTileRows = 16;   // output rows in the lanes of one vector
constexpr int kPanelRows = 32;  // two tiles, one stream
constexpr int kChunkColumns = 256;
constexpr int kMaxFewRows = 8;  // of KernelTable::few_rows
constexpr int kPageTokens = 64;
constexpr int kAttentionBlock = 512;  // positions of one softmax block
constexpr int kMaxExpertsUsed = 64;   // of a token; a multiple of kTileRows

// clang-format off
enum class WeightType : int {
  F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q4_K, Q5_K, Q6_K,
  IQ4_NL, IQ4_XS, MXFP4, NVFP4, Q2_K, Q3_K, TQ1_0, TQ2_0,
  IQ1_S, IQ1_M, IQ2_XXS, IQ2_XS, IQ2_S, IQ3_XXS, IQ3_S,
};
// clang-format on
constexpr int kNumWeightTypes = 26;

// How a page holds keys and values: float16, or int8 codes with a float16 scale per 32 columns of a head.
enum class KvType : int { F16, Q8_0 };

enum class Activation : int { kNone, kSilu, kGeluTanh, kRelu, kReluSquared, kDrelu };

constexpr int kBlockColumns = 32;  // columns that share an activation scale

// Where integer sums start (see kMagic in elementwise.inl): the zero point of the weights times the codes of a group
// of so many columns is taken off beforehand. Weights with a minimum have no zero point.
struct Start {
  int zero_point, columns;
};
constexpr int kNumStarts = 8;
constexpr Start kStarts[kNumStarts] = {{8, 32}, {16, 32}, {128, 32}, {1, 32}, {64, 32}, {32, 16}, {4, 16}, {64, 16}};
enum StartIndex : int { kStart8, kStart16, kStart128, kStart1, kStart64, kHalf32, kHalf4, kHalf64, kNoStart };

// clang-format off: in the order of WeightType
constexpr StartIndex kStartOf[kNumWeightTypes] = {
    kNoStart, kNoStart, kNoStart, kStart8, kNoStart, kStart16, kNoStart, kStart128, kNoStart, kNoStart, kHalf32,
    kStart128, kStart128, kStart16, kHalf32, kNoStart, kHalf4, kStart1, kStart1,
    kStart16, kHalf32, kStart64, kHalf64, kHalf64, kStart64, kStart16,
};
// clang-format on

// Rows of one quantised activation, in bundles of rows that a kernel multiplies at once: what it reads together stands
// together. Columns are padded with zeros to a multiple of 64.
struct QuantRows {
  int columns;
  int bundle_rows;
  int8_t* codes;     // [bundles][columns / 4][bundle_rows][4]
  float* scales;     // [bundles][columns / 32][bundle_rows]
  float* sums;       // alike: sums of the codes of a block, by which minima are multiplied
  float* half_sums;  // [bundles][columns / 16][bundle_rows], or null unless a weight has minima per 16 columns
  int32_t* starts[kNumStarts];  // by group of kStarts; null where no weight of the step reads it
  float* values;                // [rows][columns] before quantising; null unless a weight stored as floats reads it
};

// One panel (see ARCHITECTURE.md, P32) times num_rows activations, into totals [num_rows][32].
struct PanelArgs {
  const uint8_t* panel;
  WeightType type_a, type_b;
  const QuantRows* x;
  int num_rows;
  float* totals;
};

// Rows of a matrix that lie each in one piece, times num_rows activations, into totals [num_rows][32].
struct RowsArgs {
  const uint8_t* rows;
  size_t row_bytes;
  WeightType type;
  const int32_t* ids;  // of up to 32 rows
  int count;
  const int32_t* next;  // rows that are read soon
  int num_next;
  const QuantRows* x;
  int num_rows;  // up to few_rows
  float* totals;
};

// How a matrix keeps the codes of its columns, each in one piece, and the scales of 32 columns and all outputs.
struct NeuronForm {
  bool is_nibble;  // else a byte a code
  bool is_half;    // scales and minima are float16, else float32
  bool has_minimum;
  bool is_halved;  // each half of a block has its own scale and minimum, as float32
  int zero_point;
};

// One block of 32 columns, of which those are named whose activation is not zero, in quads.
struct NeuronsArgs {
  NeuronForm form;
  const uint8_t* codes;
  size_t row_bytes;  // of one column
  const int32_t* ids;
  const int8_t* activations;  // [ends[1]][4], the last quad of a half padded with zeros
  int ends[2];                // of the quads of each half; where scales are of the block, of all
  const int32_t* next;        // columns that are read soon
  int num_next;
  const uint8_t *scales, *minima;  // of the block, by output; of its second half `plane_bytes` behind
  size_t plane_bytes, next_block;  // those of the block of `next` are so many bytes behind
  float sums[2], scale;            // of the activation codes of each half, or of the block
  int first_output, end_output;    // multiples of 128
  float* y;                        // [outputs]
};

// Columns [first, last), multiples of 16, of a row of `columns`: 0 where the magnitude of activation(x) is below the
// threshold of its column or, where those are null, below mean + deviations * standard deviation of the row's.
struct TrimArgs {
  const float* x;
  int columns;
  Activation activation;
  const float* thresholds;  // padded to 64
  float deviations;
  int first, last;
  float* out;
};

// What the experts of a row say, 32 columns of it: out = sum over ranks of weights[rank] * totals[places[rank]], then
// residual +.
struct MixArgs {
  const float* totals;
  size_t stride;  // floats from one place to the next
  const int32_t* places;
  const float* weights;
  int num_used;
  const float* residual;  // or null
  float* out;
};

struct RopeArgs {
  const float* table;  // [dims]: cosines, then sines, of this position
  int dims;
  int head_dim;
  const float* norm;  // [head_dim] or null
  float norm_eps;
};

// One query tile of one KV head: rows are (token, head of the group), token-major.
struct AttendArgs {
  const float* q;  // first token's first head of the group
  float* out;      // same place in the output
  size_t token_stride;
  int num_tokens, group, head_dim;
  int first_position;  // of the first token
  int window;          // 0: none
  float scale;
  const int32_t* pages;  // page ids by page index
  KvType kv_type;
  const uint8_t* kv;   // page 0 of this layer and head
  size_t page_stride;  // in bytes
  float* scratch;      // attend_scratch_floats(rows, head_dim)
};

constexpr int kKvScaleColumns = 32;  // of a head, that share a scale in a Q8_0 page

// A page of one head is its keys, then its values. F16: keys [head_dim][64], values [64][head_dim]. Q8_0: codes in the
// same order, after a plane of float16 scales [blocks of 32 columns][64].
inline size_t kv_scales_bytes(KvType type, int head_dim) {
  if (type == KvType::F16) return 0;
  const int blocks = (head_dim + kKvScaleColumns - 1) / kKvScaleColumns;
  return sizeof(uint16_t) * kPageTokens * static_cast<size_t>(blocks);
}
inline size_t kv_half_bytes(KvType type, int head_dim) {  // keys alone, or values
  const size_t elements = static_cast<size_t>(kPageTokens) * head_dim;
  return kv_scales_bytes(type, head_dim) + elements * (type == KvType::Q8_0 ? 1 : sizeof(uint16_t));
}

// Partial result of one row over one block: [best, total, unused, unused][head_dim]
inline size_t partial_floats(int head_dim) { return 4 + static_cast<size_t>(head_dim); }

// Scores of a tile's rows, one widened page, then a partial and a running best and total for every row.
inline size_t attend_scratch_floats(int rows, int head_dim) {
  return static_cast<size_t>(rows) * (kAttentionBlock + partial_floats(head_dim) + 2) +
         static_cast<size_t>(kPageTokens) * head_dim;
}

struct KernelTable {
  const char* name;
  int few_rows, many_rows;  // up to few_rows rows are one bundle; more are bundles of many_rows
  void (*read_lines)(const uint8_t* data, size_t bytes);  // every line of 64 bytes, and nothing else: decode's limit
  void (*rms_norm)(const float* x, const float* weight, int n, float eps, float* out);
  void (*layer_norm)(const float* x, const float* weight, const float* bias, int n, float eps, float* out);
  void (*add_norm)(const float* a, const float* b, const float* weight, int n, float eps, float* out);
  void (*add)(const float* a, const float* b, int n, float* out);
  void (*quantise)(const float* x, const QuantRows& out, int row);
  void (*multiply_panel)(const PanelArgs& args);
  void (*multiply_rows)(const RowsArgs& args);
  void (*add_neurons)(const NeuronsArgs& args);
  // out[i] = activation(totals[i] + bias) + residual over 32 columns; bias and residual may be null
  void (*finish_linear)(const float* totals, const float* bias, Activation activation, const float* residual,
                        float* out);
  void (*trim)(const TrimArgs& args);
  // out[i] = activation(totals[i]) * totals[16 + i] over 16 columns; 0 where the first is
  void (*finish_glu)(const float* totals, Activation activation, float* out);
  void (*embed_row)(const uint8_t* panel, WeightType type, int lane, int columns, float scale, float* out);
  // Norms and rotates one head in place.
  void (*rope)(const RopeArgs& args, float* head);
  // Writes one token's head into position `slot` of its page.
  void (*append)(KvType type, const float* k, const float* v, int head_dim, int slot, uint8_t* page);
  void (*attend)(const AttendArgs& args);                                    // all blocks, in order
  void (*attend_block)(const AttendArgs& args, int block, float* partials);  // one block, a partial a row
  void (*merge_blocks)(const float* partials, size_t block_stride, int num_blocks, int head_dim, float* out);
  // out [2 * num_used]: ids of the experts with the largest logits, then their weights
  void (*route)(const float* logits, int num_experts, int num_used, float* out);
  void (*mix)(const MixArgs& args);
};

inline int bundle_rows(const KernelTable& kernels, int num_rows) {
  return num_rows <= kernels.few_rows ? num_rows : kernels.many_rows;
}

extern const KernelTable kScalarTable;
#if defined(__x86_64__) || defined(_M_X64)
extern const KernelTable kAvx2Table;
extern const KernelTable kAvxVnniTable;
extern const KernelTable kAvx512Table;
#elif defined(__aarch64__)
extern const KernelTable kNeonTable;
extern const KernelTable kNeonI8mmTable;
#endif

}  // namespace isotherm
