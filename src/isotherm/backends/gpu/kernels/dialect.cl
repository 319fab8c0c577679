// The C dialect of the kernels: what OpenCL C and CUDA C++ spell differently, and the scalar functions of the arithmetic
// contract (ARCHITECTURE.md). A group has one dimension of lanes. SHARED: a variable of the group; LOCAL: what points to
// one.
#ifdef __OPENCL_VERSION__
#pragma OPENCL FP_CONTRACT OFF
#define KERNEL(lanes) __kernel __attribute__((reqd_work_group_size(lanes, 1, 1)))  // of a group
#define ROOMY_KERNEL(lanes) KERNEL(lanes)
#define GLOBAL __global
#define LOCAL __local
#define SHARED __local
#define CONSTANT __constant
#define INLINE static inline
#define GROUP(dimension) ((int)get_group_id(dimension))
#define LANE ((int)get_local_id(0))
#define BARRIER() barrier(CLK_LOCAL_MEM_FENCE)
#define BITS_OF(x) as_uint(x)
#define FLOAT_OF(bits) as_float(bits)
#define FMA(a, b, c) fma(a, b, c)
#define ATOMIC_ADD(at, value) atomic_add(at, value)
typedef uchar u8;
typedef ulong u64;
typedef char i8;

INLINE float half_of(uint bits) {
  ushort h = (ushort)bits;
  return vload_half(0, (const half*)&h);
}
INLINE float half_at(GLOBAL const u8* p) { return vload_half(0, (GLOBAL const half*)p); }
INLINE void store_half(float x, GLOBAL u8* p) { vstore_half_rte(x, 0, (GLOBAL half*)p); }
#else  // contraction is off by an option
#define KERNEL(lanes) extern "C" __global__ __launch_bounds__(lanes)
// Whose lanes may have all registers. By itself the compiler saves them, so that more groups run at once, and loads words
// one after another where all could be on their way.
#define ROOMY_KERNEL(lanes) extern "C" __global__ __launch_bounds__(lanes, 1)
#define GLOBAL
#define LOCAL
#define SHARED __shared__
#define CONSTANT __constant__
#define INLINE static __device__ __forceinline__
#define GROUP(dimension) ((int)(dimension == 0 ? blockIdx.x : dimension == 1 ? blockIdx.y : blockIdx.z))
#define LANE ((int)threadIdx.x)
#define BARRIER() __syncthreads()
#define BITS_OF(x) __float_as_uint(x)
#define FLOAT_OF(bits) __uint_as_float(bits)
#define FMA(a, b, c) __fmaf_rn(a, b, c)
#define ATOMIC_ADD(at, value) atomicAdd(at, value)
#define INFINITY FLOAT_OF(0x7F800000u)
typedef unsigned char u8;
typedef unsigned long long u64;
typedef signed char i8;
typedef unsigned short ushort;
typedef unsigned int uint;

INLINE float half_of(uint bits) {
  float x;
  asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"((ushort)bits));
  return x;
}
INLINE float half_at(const u8* p) { return half_of(*(const ushort*)p); }
INLINE void store_half(float x, u8* p) {
  ushort bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x));
  *(ushort*)p = bits;
}
INLINE char4 as_char4(uint x) { return *(const char4*)&x; }
#endif

#define NOT_A_NUMBER FLOAT_OF(0x7FC00000u)
INLINE float float_at(GLOBAL const u8* p) { return *(GLOBAL const float*)p; }
INLINE uint word_at(GLOBAL const u8* p) { return *(GLOBAL const uint*)p; }

// sum + the dot product of four signed bytes each. DOT4: by which means, as Dot4 in sources.py.
INLINE int dot4(uint a, uint b, int sum) {
#if DOT4 == 1
  return sum + dot_4x8packed_ss_int(a, b);
#elif DOT4 == 2
  int result;
  asm("dp4a.s32.s32 %0, %1, %2, %3;" : "=r"(result) : "r"(a), "r"(b), "r"(sum));
  return result;
#else
  const char4 x = as_char4(a), y = as_char4(b);
  return sum + x.x * y.x + x.y * y.y + x.z * y.z + x.w * y.w;
#endif
}

INLINE float exp_(float x) {
  x = x < -87.0f ? -87.0f : x;
  x = x > 88.0f ? 88.0f : x;
  const float n = rint(x * 1.44269504f);
  float r = FMA(n, -0.693145752f, x);
  r = FMA(n, -1.42860677e-6f, r);
  float p = 0.00139411189f;
  p = FMA(p, r, 0.00837513477f);
  p = FMA(p, r, 0.0416663528f);
  p = FMA(p, r, 0.166664154f);
  p = FMA(p, r, 0.5f);
  p = FMA(p, r, 1.0f);
  p = FMA(p, r, 1.0f);
  return p * FLOAT_OF((uint)((int)n + 127) << 23);
}

INLINE float positive(float x) { return 0.0f > x ? 0.0f : x; }

// In the order of Activation in native/kernels/table.h.
INLINE float activate(float x, int activation) {
  switch (activation) {
    case 1: return x / (1.0f + exp_(-x));
    case 2: return x - x / (exp_((x * 1.5957691216f) * FMA(x * x, 0.044715f, 1.0f)) + 1.0f);
    case 3:
    case 5: return positive(x);
    case 4: return positive(x) * positive(x);
    default: return x;
  }
}

// Halves are added until one is left.
INLINE float sum_lanes(LOCAL const float* lanes) {
  float x[8];
  for (int i = 0; i < 8; i++) x[i] = lanes[i] + lanes[i + 8];
  for (int i = 0; i < 4; i++) x[i] = x[i] + x[i + 4];
  for (int i = 0; i < 2; i++) x[i] = x[i] + x[i + 2];
  return x[0] + x[1];
}

// One block of 32 columns of a weight row: codes, and scale and minimum of its groups.
typedef struct {
  uint codes[8];
  float scale[2], minimum[2];
} Block;

// Of what a batch's rows are told; native/runtime/gpu_program.h has its form. States: groups of layers with KV pages.
#define NUM_ROWS(batch) ((batch)[0])
#define TOKEN_ID(batch, row) ((batch)[1 + (row)])
#define POSITION(batch, row) ((batch)[1 + NUM_ROWS(batch) + (row)])
#define PAGE_TABLE(batch, row, state) ((batch) + (batch)[1 + (2 + (state)) * NUM_ROWS(batch) + (row)])
