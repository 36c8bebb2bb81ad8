// One decode step from C: 4 query heads read their own cache and, through a projector, a sharer's. `make run`
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include "c2c.h"

enum { HEADS = 4, DIM = 16, OWN = 37, SHARED = 53, WIDTH = 24 };  // one KV head; the sharer's has WIDTH dimensions

static float query[HEADS][DIM], key[OWN][DIM], value[OWN][DIM], out[HEADS][DIM], mass[HEADS][2];
static float sharer_key[SHARED][WIDTH], sharer_value[SHARED][WIDTH], key_proj[DIM][WIDTH], value_proj[DIM][WIDTH];

static void fill(void *to, size_t bytes) {
  for (size_t i = 0; i < bytes / sizeof(float); i++) ((float *)to)[i] = (float)rand() / RAND_MAX - 0.5f;
}

static c2c_tensor tensor(void *data, int64_t a, int64_t b, int64_t c, int64_t d) {  // strides in elements
  return (c2c_tensor){data, {a, b, c, d}, C2C_F32};
}

static double project(const float *proj, const float *raw) {
  double sum = 0;
  for (int i = 0; i < WIDTH; i++) sum += (double)proj[i] * raw[i];
  return sum;
}

int main(void) {
  fill(query, sizeof query), fill(key, sizeof key), fill(value, sizeof value), fill(key_proj, sizeof key_proj);
  fill(sharer_key, sizeof sharer_key), fill(sharer_value, sizeof sharer_value), fill(value_proj, sizeof value_proj);
  // clang-format off
  c2c_segment sharer = {.key = tensor(sharer_key, 0, 0, WIDTH, 1), .value = tensor(sharer_value, 0, 0, WIDTH, 1),
      .key_proj = tensor(key_proj, 0, WIDTH, 1, 0), .value_proj = tensor(value_proj, 0, WIDTH, 1, 0),
      .heads = 1, .key_dim = WIDTH, .value_dim = WIDTH, .len = SHARED, .raw_len = SHARED};
  c2c_attention_params params = {.query = tensor(query, 0, DIM, DIM, 1), .key = tensor(key, 0, 0, DIM, 1),
      .value = tensor(value, 0, 0, DIM, 1), .out = tensor(out, 0, DIM, DIM, 1), .mass = tensor(mass, 0, 2, 2, 1),
      .segments = &sharer, .segment_count = 1, .batch = 1, .q_heads = HEADS, .kv_heads = 1, .q_len = 1,
      .len = OWN, .head_dim = DIM, .value_dim = DIM, .scale = 0.25f};
  // clang-format on
  c2c_status status = c2c_merged_attention_cpu(&params);
  if (status.code != C2C_OK) return fprintf(stderr, "%s\n", c2c_status_text(status.code)), 1;

  double worst = 0;
  for (int h = 0; h < HEADS; h++) {  // the same by the formula
    double weights[OWN + SHARED], total = 0;
    for (int j = 0; j < OWN + SHARED; j++) {
      double score = 0;
      for (int d = 0; d < DIM; d++)
        score += query[h][d] * (j < OWN ? key[j][d] : project(key_proj[d], sharer_key[j - OWN]));
      total += weights[j] = exp(0.25 * score);
    }
    for (int d = 0; d < DIM; d++) {
      double sum = 0;
      for (int j = 0; j < OWN + SHARED; j++)
        sum += weights[j] * (j < OWN ? value[j][d] : project(value_proj[d], sharer_value[j - OWN]));
      worst = fmax(worst, fabs(sum / total - out[h][d]));
    }
  }
  printf("%s: largest error %.1e, share of the sharer in head 0 %.3f\n", c2c_cpu_isa(), worst, mass[0][1]);
  return worst > 1e-6;
}
