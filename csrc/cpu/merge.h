// merge_states. Included inside an instruction set's namespace.

constexpr int64_t MERGED_VECTORS = 8;  // of a row summed in registers over all states

// What one thread needs for one row.
struct MergeScratch {
  float *weights, *sums;
  const void **from;  // of the states that count, as are `weight` and `dtype`
  float *weight;
  int32_t *dtype;
  int64_t count = 0;

  MergeScratch(Carver &carver, const c2c_merge_params &p) {
    weights = carver.take(LANES * p.state_count);
    sums = carver.take(round_up(p.head_dim, LANES));
    from = (const void **)carver.take(2 * p.state_count);
    weight = carver.take(p.state_count);
    dtype = (int32_t *)carver.take(p.state_count);
  }
};

// sums = the weighted states of a row over `vectors` whole vectors from d on.
template <int VECTORS>
static ALWAYS_INLINE void sum_states(const MergeScratch &x, int64_t d, float share) {
  V sum[VECTORS] = {};
  for (int64_t s = 0; s < x.count; ++s)
    with_type(x.dtype[s], x.from[s], [&](auto *state) __attribute__((always_inline)) {
      const V weight = set1(x.weight[s]);
#pragma GCC unroll 8
      for (int v = 0; v < VECTORS; ++v) sum[v] = weight * load(state + d + v * LANES) + sum[v];
    });
#pragma GCC unroll 8
  for (int v = 0; v < VECTORS; ++v) store(x.sums + d + v * LANES, sum[v] * share);
}

static void merge_row(const c2c_merge_params &p, MergeScratch &x, float share) {
  int64_t d = 0;
  for (; d + MERGED_VECTORS * LANES <= p.head_dim; d += MERGED_VECTORS * LANES) sum_states<MERGED_VECTORS>(x, d, share);
  for (; d + LANES <= p.head_dim; d += LANES) sum_states<1>(x, d, share);
  if (d == p.head_dim) return;
  V sum = {};
  for (int64_t s = 0; s < x.count; ++s)
    with_type(x.dtype[s], x.from[s],
              [&](auto *state) { sum = set1(x.weight[s]) * load_first(state + d, p.head_dim - d) + sum; });
  store(x.sums + d, sum * share);
}

// Rows i .. i + n, n <= LANES, of one head: their weights side by side.
static void merge_rows(const c2c_merge_params &p, int64_t b, int64_t h, int64_t i, int64_t n, MergeScratch &x) {
  V largest = set1(-INF);
  for (int32_t s = 0; s < p.state_count; ++s) {
    const c2c_tensor &t = p.lses[s];
    float *const lses = x.weights + s * LANES;
    for (int64_t r = 0; r < LANES; ++r)
      lses[r] = r < n ? number_at(t, b * t.stride[0] + h * t.stride[1] + (i + r) * t.stride[2]) : -INF;
    const V lse = load(lses);
    largest = select((lse > largest) | (lse != lse), lse, largest);
  }
  // A row where no state saw anything, or one that is broken, keeps that: -inf and 0, NaN and NaN.
  const V base = select(largest == set1(-INF), V{}, largest);
  V total = {};
  for (int32_t s = 0; s < p.state_count; ++s) {
    const V weight = vexp(load(x.weights + s * LANES) - base);
    store(x.weights + s * LANES, weight);
    total += weight;
  }
  const V share = select(total == V{}, V{}, 1.0f / total);
  for (int64_t r = 0; r < n; ++r) {
    x.count = 0;
    for (int32_t s = 0; s < p.state_count; ++s) {
      const float weight = x.weights[s * LANES + r];
      if (weight == 0.0f) continue;
      x.from[x.count] = at(p.outs[s], b, h, i + r);
      x.dtype[x.count] = p.outs[s].dtype;
      x.weight[x.count++] = weight;
    }
    merge_row(p, x, share[r]);
    narrow_row(p.out.dtype, const_cast<void *>(at(p.out, b, h, i + r)), x.sums, p.head_dim);
    ((float *)p.lse.data)[b * p.lse.stride[0] + h * p.lse.stride[1] + (i + r) * p.lse.stride[2]] =
        total[r] == 0.0f ? -INF : base[r] + logf(total[r]);
  }
}

static c2c_status_code merge_states(const c2c_merge_params &p) {
  const int64_t groups = div_up(p.q_len, LANES), units = p.batch * p.q_heads * groups;
  const int threads = thread_count(p.threads, (double)p.batch * p.q_heads * p.q_len * p.head_dim * p.state_count);
  Carver sizing{nullptr};
  MergeScratch sized(sizing, p);
  const int64_t floats = round_up(sizing.used, 1024);
  Block memory(threads * floats);
  if (!memory.data) return C2C_NO_MEMORY;
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t unit = 0; unit < units; ++unit) {
    Carver carver{memory.data + thread_number() * floats};
    MergeScratch x(carver, p);
    const int64_t head = unit / groups, i = unit % groups * LANES;
    merge_rows(p, head / p.q_heads, head % p.q_heads, i, least<int64_t>(LANES, p.q_len - i), x);
  }
  return C2C_OK;
}
