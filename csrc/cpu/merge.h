// merge_states. Included inside an instruction set's namespace.

static c2c_status_code merge_states(const c2c_merge_params &p) {
  const int64_t rows = p.batch * p.q_heads * p.q_len;
  const int threads = thread_count(p.threads, (double)rows * p.head_dim * p.state_count);
  const int64_t floats = round_up(round_up(p.head_dim, LANES) + round_up(p.state_count, LANES), 1024);
  Block memory(threads * floats);
  if (!memory.data) return C2C_NO_MEMORY;
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t i = row % p.q_len, h = row / p.q_len % p.q_heads, b = row / p.q_len / p.q_heads;
    float *out = memory.data + thread_number() * floats, *lses = out + round_up(p.head_dim, LANES);
    float largest = -INF;
    for (int32_t s = 0; s < p.state_count; ++s) {
      const c2c_tensor &t = p.lses[s];
      lses[s] = number_at(t, b * t.stride[0] + h * t.stride[1] + i * t.stride[2]);
      largest = lses[s] > largest || lses[s] != lses[s] ? lses[s] : largest;
    }
    // A row where no state saw anything, or one that is broken, keeps that: -inf and 0, NaN and NaN.
    const float base = largest == -INF ? 0.0f : largest;
    float total = 0.0f;
    for (int32_t s = 0; s < p.state_count; s += LANES) {
      V weight = vexp(load(lses + s) - base);
      store(lses + s, weight);
    }
    for (int32_t s = 0; s < p.state_count; ++s) total += lses[s];
    const float share = total == 0.0f ? 0.0f : 1.0f / total;
    memset(out, 0, p.head_dim * sizeof(float));
    for (int32_t s = 0; s < p.state_count; ++s)
      if (lses[s] != 0.0f)
        weigh_tokens(lses + s, 1, 1, p.outs[s].dtype, at(p.outs[s], b, h, i), p.head_dim, 1, p.head_dim, out,
                     p.head_dim);
    for (int64_t d = 0; d < p.head_dim; ++d) out[d] *= share;
    narrow_row(p.out.dtype, const_cast<void *>(at(p.out, b, h, i)), out, p.head_dim);
    ((float *)p.lse.data)[b * p.lse.stride[0] + h * p.lse.stride[1] + i * p.lse.stride[2]] =
        total == 0.0f ? -INF : base + logf(total);
  }
  return C2C_OK;
}
