// What is done with totals. flags: 1 bias, 2 residual, 4 GLU; 8 * activation. An out row begins at `offset`.
#define FINISH_PARAMETERS                                                                                 \
  int flags, GLOBAL const float *bias, GLOBAL const float *residual, int residual_stride, GLOBAL float *out, \
      int width, int offset, int stride
#define FINISH_ARGUMENTS flags, bias, residual, residual_stride, out, width, offset, stride

// The totals of one row, a lane each; `exchange` is the slice's own [32]. Every lane of the group comes here.
INLINE void finish(float total, int row, int is_row, int lane, LOCAL float* exchange, FINISH_PARAMETERS) {
  const int activation = flags >> 3;
  int column = GROUP(0) * 32 + lane;
  exchange[lane] = total;
  BARRIER();
  if (flags & 4) {
    const float up = exchange[16 + lane % 16], hidden = activate(total, activation);
    total = hidden == 0.0f ? 0.0f : hidden * (activation == 5 ? positive(up) : up);
    column = lane < 16 ? GROUP(0) * 16 + lane : width;
  } else {
    if (flags & 1) total = total + bias[column];
    total = activate(total, activation);
  }
  BARRIER();
  if (!is_row || column >= width) return;
  if (flags & 2) total = residual[(size_t)row * residual_stride + column] + total;
  out[(size_t)row * stride + offset + column] = total;
}
