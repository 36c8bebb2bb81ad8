// The softmax state that every attention kernel carries: update with a tile, merge with another, finish.
// Included inside an instruction set's namespace.
//
// Empty case: before any visible token max = -inf and sum = 0. A tile or state with max = -inf changes nothing, bit
// for bit; a state that is still empty at the end finishes as lse = -inf and weight 0, never NaN.

struct SoftmaxState {
  float max = -INF;
  float sum = 0.0f;

  // Takes in a tile's maximum; returns the factor for everything accumulated so far.
  ALWAYS_INLINE float update(float tile_max) {
    if (!(tile_max > max) && tile_max == tile_max) return 1.0f;
    float factor = max == -INF ? 0.0f : exp1(max - tile_max);
    max = tile_max;
    sum *= factor;
    return factor;
  }

  // Takes in another state whose accumulator counts `sum`; only max and sum are merged here.
  ALWAYS_INLINE void merge(const SoftmaxState &other) {
    if (other.max == -INF) return;
    update(other.max);
    sum += other.sum * exp1(other.max - max);
  }

  // Weight of an accumulator that was kept relative to `relative_max`.
  ALWAYS_INLINE float weight(float relative_max) const {
    return relative_max == -INF || sum == 0.0f ? 0.0f : exp1(relative_max - max) / sum;
  }

  ALWAYS_INLINE float finish() const { return sum == 0.0f ? -INF : max + logf(sum); }
};
