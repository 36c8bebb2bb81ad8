// merge_states. Included inside an instruction set's namespace.

static c2c_status_code merge_states(const c2c_merge_params &p) {
  const int64_t rows = p.batch * p.q_heads * p.q_len;
  const int threads = thread_count(p.threads, (double)rows * p.head_dim * p.state_count);
  const int64_t floats = round_up(2 * p.head_dim + 16, 1024);
  Block memory(threads * floats);
  if (!memory.data) return C2C_NO_MEMORY;
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t i = row % p.q_len, h = row / p.q_len % p.q_heads, b = row / p.q_len / p.q_heads;
    float *out = memory.data + thread_number() * floats, *state = out + p.head_dim;
    SoftmaxState total;
    auto lse = [&](int32_t s) {
      const c2c_tensor &t = p.lses[s];
      return number_at(t, b * t.stride[0] + h * t.stride[1] + i * t.stride[2]);
    };
    for (int32_t s = 0; s < p.state_count; ++s) total.merge(SoftmaxState{lse(s), 1.0f});
    memset(out, 0, p.head_dim * sizeof(float));
    for (int32_t s = 0; s < p.state_count; ++s) {
      if (lse(s) == -INF) continue;
      const float weight = total.weight(lse(s));
      widen_row(state, p.outs[s].dtype, at(p.outs[s], b, h, i), p.head_dim);
      for (int64_t d = 0; d < p.head_dim; ++d) out[d] += weight * state[d];
    }
    narrow_row(p.out.dtype, const_cast<void *>(at(p.out, b, h, i)), out, p.head_dim);
    ((float *)p.lse.data)[b * p.lse.stride[0] + h * p.lse.stride[1] + i * p.lse.stride[2]] = total.finish();
  }
  return C2C_OK;
}
