// quantize: a float cache to int8 with a scale for every token and head. Included inside an instruction set's
// namespace.

// One row: scale = max |x| / 127, q = x / scale rounded to nearest even. |x - q scale| <= scale / 2. A row of zeros has
// the scale 0.
template <class T>
static void quantize_row(const T *x, int64_t n, int8_t *q, float *scale) {
  const int64_t whole = n / LANES * LANES;
  V largest = {};
  VI broken = {};
  auto measure = [&](V v) {
    V magnitude = bit_cast<V>(bit_cast<VI>(v) & 0x7fffffff);
    largest = vmax(magnitude, largest);
    broken |= v != v;
  };
  for (int64_t d = 0; d < whole; d += LANES) measure(load(x + d));
  if (whole < n) measure(load_first(x + whole, n - whole));
  float peak = 0.0f;
  bool nan = false;
  for (int l = 0; l < LANES; ++l) {
    peak = most(peak, largest[l]);
    nan = nan || broken[l];
  }
  *scale = nan ? __builtin_nanf("") : peak / 127.0f;  // a row that is not finite stays so
  const V inverse = set1(*scale > 0.0f && *scale < INF ? 1.0f / *scale : 0.0f);
  const V magic = set1(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer in the low bits
  for (int64_t d = 0; d < n; d += LANES) {
    const int64_t count = least<int64_t>(LANES, n - d);
    V v = count == LANES ? load(x + d) : load_first(x + d, count);
    VI rounded = bit_cast<VI>(select(inverse > V{}, v * inverse, V{}) + magic) - 0x4b400000;
    for (int64_t i = 0; i < count; ++i) q[d + i] = (int8_t)least(most(rounded[i], -127), 127);
  }
}

static c2c_status_code quantize(const c2c_quantize_params &p) {
  const int64_t rows = p.batch * p.heads * p.len;
  const int threads = thread_count(p.threads, (double)rows * p.dim * 4);
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t j = row % p.len, h = row / p.len % p.heads, b = row / p.len / p.heads;
    int8_t *q = (int8_t *)const_cast<void *>(at(p.out, b, h, j));
    float *scale = (float *)p.scale.data + b * p.scale.stride[0] + h * p.scale.stride[1] + j * p.scale.stride[2];
    with_type(p.x.dtype, at(p.x, b, h, j), [&](auto *x) { quantize_row(x, p.dim, q, scale); });
  }
  return C2C_OK;
}
