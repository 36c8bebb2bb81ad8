// Projection of a tile of tokens. Included inside an instruction set's namespace.
//
// A job is one tile of tokens of one half (keys or values): gather, scale and un-rotate into float32 rows, multiply by
// every row of the projector, add the bias, rotate, round once into the destination. Few tokens stream the weights
// through dot products; more tokens are the packed side of register-blocked products, so weights are never re-laid.

constexpr int64_t TOKEN_TILE = 128;
constexpr int64_t SMALL_TILE = 32;    // where tiles are few (project_kv.h)
constexpr int64_t WEIGHT_ROWS = 64;   // projector rows widened and multiplied at a time
constexpr int64_t PIECE = 256;        // of the width summed in one chain; wider sums are sums of pieces
constexpr int64_t STREAM_TOKENS = 8;  // up to here weights are streamed once by dot products

struct Half {
  const c2c_tensor *raw, *proj, *proj_in, *bias, *scale, *out;
  int64_t dim, width, rank, out_dim;
  bool key;
};

static Half half_of(const c2c_project_params &p, bool key) {
  const c2c_segment &s = p.segment;
  if (key)
    return {&s.key,    &s.key_proj,         &s.key_proj_in, &s.key_bias, &s.key_scale, &p.key_out,
            s.key_dim, s.heads * s.key_dim, s.key_rank,     p.head_dim,  true};
  return {&s.value,    &s.value_proj,         &s.value_proj_in, &s.value_bias, &s.value_scale, &p.value_out,
          s.value_dim, s.heads * s.value_dim, s.value_rank,     p.out_dim,     false};
}

static float e4m3_to_float(uint8_t x) {
  int exponent = x >> 3 & 15, mantissa = x & 7;
  float magnitude = exponent ? ldexpf((float)(8 + mantissa), exponent - 10) : ldexpf((float)mantissa, -9);
  if ((x & 0x7f) == 0x7f) magnitude = __builtin_nanf("");
  return x & 0x80 ? -magnitude : magnitude;
}

static void widen_stored(float *to, int32_t dtype, const void *from, int64_t n) {
  if (dtype == C2C_F8E4M3)
    for (int64_t i = 0; i < n; ++i) to[i] = e4m3_to_float(((const uint8_t *)from)[i]);
  else
    widen_row(to, dtype, from, n);
}

static void load_table(float *to, const c2c_tensor &table, int64_t b, int64_t token, int64_t n) {
  widen_row(to, table.dtype,
            (const char *)table.data + (b * table.stride[0] + token * table.stride[1]) * dtype_size(table.dtype), n);
}

// x <- x cos + (-x2, x1) sin on the first `n` dimensions, or its inverse. Tables may carry a factor.
static void turn(float *x, const float *cos, const float *sin, int64_t n, bool inverse) {
  for (int64_t i = 0, half = n / 2; i < half; ++i) {
    const float a = x[i], b = x[i + half];
    if (!inverse) {
      x[i] = a * cos[i] - b * sin[i];
      x[i + half] = b * cos[i + half] + a * sin[i + half];
    } else {
      x[i] = (a * cos[i] + b * sin[i]) / (cos[i] * cos[i] + sin[i] * sin[i]);
      x[i + half] =
          (b * cos[i + half] - a * sin[i + half]) / (cos[i + half] * cos[i + half] + sin[i + half] * sin[i + half]);
    }
  }
}

// Selected tokens j .. j + n of batch row b, flattened over sharer heads, [n][ld]; padding is zero.
static void load_raw(const c2c_project_params &p, const Half &half, int64_t b, int64_t j, int64_t n, float *to,
                     int64_t ld, float *tables) {
  const c2c_segment &s = p.segment;
  const bool unturn = half.key && p.remove_cos.data;
  for (int64_t t = 0; t < n; ++t, to += ld) {
    int64_t token = j + t;
    if (s.index.data) token = integer_at(s.index, b * s.index.stride[0] + token * s.index.stride[1]);
    if (unturn) {
      load_table(tables, p.remove_cos, b, token, p.remove_dim);
      load_table(tables + p.remove_dim, p.remove_sin, b, token, p.remove_dim);
    }
    for (int64_t head = 0; head < s.heads; ++head) {
      float *row = to + head * half.dim;
      widen_stored(row, half.raw->dtype, at(*half.raw, b, head, token), half.dim);
      if (half.scale->data) {
        float scale = number_at(
            *half.scale, b * half.scale->stride[0] + head * half.scale->stride[1] + token * half.scale->stride[2]);
        for (int64_t d = 0; d < half.dim; ++d) row[d] *= scale;
      }
      if (unturn) turn(row, tables, tables + p.remove_dim, p.remove_dim, true);
    }
    for (int64_t d = half.width; d < ld; ++d) to[d] = 0.0f;
  }
}

// Bias, rotation and rounding of one projected row of one head.
static void write_row(const c2c_project_params &p, const Half &half, int64_t b, int64_t head, int64_t token, float *row,
                      const float *bias, float *tables) {
  if (bias)
    for (int64_t d = 0; d < half.out_dim; ++d) row[d] += bias[d];
  if (half.key && p.apply_cos.data) {
    load_table(tables, p.apply_cos, b, token, p.apply_dim);
    load_table(tables + p.apply_dim, p.apply_sin, b, token, p.apply_dim);
    turn(row, tables, tables + p.apply_dim, p.apply_dim, false);
  }
  narrow_row(half.out->dtype, const_cast<void *>(at(*half.out, b, head, token)), row, half.out_dim);
}

struct ProjectScratch {
  float *raw, *inner, *panels, *products, *piece, *turned, *weights, *row, *bias, *tables;

  ProjectScratch(Carver &carver, const c2c_project_params &p, const Half &half) {
    const int64_t width = round_up(most(half.width, half.rank), PANEL), out = round_up(half.out_dim, PANEL);
    raw = carver.take(TOKEN_TILE * width);
    inner = carver.take(half.rank ? TOKEN_TILE * round_up(half.rank, PANEL) : 0);
    panels = carver.take(TOKEN_TILE * width);
    products = carver.take(round_up(most(half.rank, half.out_dim), LANES) * TOKEN_TILE + STREAM_TOKENS * out);
    piece = carver.take(MATRIX_TILES && most(half.width, half.rank) > PIECE ? TOKEN_TILE * PANEL : 0);
    turned = carver.take(LANES * out);
    weights = carver.take(WEIGHT_ROWS * width);
    row = carver.take(out);
    bias = carver.take(out);
    tables = carver.take(2 * most(most(p.apply_dim, p.remove_dim), out));
  }
};

static int64_t project_scratch(const c2c_project_params &p, const Half &half) {
  Carver carver{nullptr};
  ProjectScratch sized(carver, p, half);
  return carver.used;
}

static double project_work(const c2c_project_params &p, const Half &half) {
  return (double)p.batch * p.segment.len * p.kv_heads * half.out_dim * (half.proj->data ? half.width : 1);
}

// products[rows][TOKEN_TILE] = weights[rows][width] x tokens, with tokens packed in panels. A sum over the width is
// made of sums over pieces of it, whatever the rows and tokens: its error grows with a piece, not with the width.
static void multiply(const c2c_tensor &weights, const void *first, int64_t row_stride, int64_t rows, int64_t width,
                     const float *panels, int64_t tokens, ProjectScratch &x) {
  for (int64_t r = 0; r < rows; r += WEIGHT_ROWS) {
    const int64_t n = least(WEIGHT_ROWS, rows - r);
    const char *from = (const char *)first + r * row_stride * dtype_size(weights.dtype);
    const float *w = (const float *)from;
    int64_t ld = row_stride;
    if (weights.dtype != C2C_F32) {
      ld = round_up(width, PANEL);
      for (int64_t i = 0; i < n; ++i)
        widen_row(x.weights + i * ld, weights.dtype, from + i * row_stride * dtype_size(weights.dtype), width);
      w = x.weights;
    }
    for (int64_t k = 0; k < width; k += PIECE)
      gemm(n, tokens, least(PIECE, width - k), w + k, ld, 1, panels + k * PANEL, PANEL, width * PANEL,
           x.products + r * TOKEN_TILE, TOKEN_TILE, k > 0);
  }
}

static void project_tile(const c2c_project_params &p, const Half &half, int64_t b, int64_t first_head,
                         int64_t last_head, int64_t j, int64_t n, ProjectScratch &x) {
  const int64_t ld = round_up(half.width, PANEL);
  load_raw(p, half, b, j, n, x.raw, ld, x.tables);
  const float *rows = x.raw;
  int64_t width = half.width, row_ld = ld;
  const bool stream = n <= STREAM_TOKENS;
  if (half.proj->data && half.proj_in->data) {
    row_ld = round_up(half.rank, PANEL);
    if (stream) {
      memset(x.inner, 0, n * row_ld * sizeof(float));
      dot_weights(x.raw, ld, n, half.proj_in->dtype, half.proj_in->data, half.proj_in->stride[0], half.rank, half.width,
                  x.inner, row_ld, at(*half.proj, first_head));
    } else {
      pack_panels_transposed(x.panels, x.raw, ld, half.width, n);
      multiply(*half.proj_in, half.proj_in->data, half.proj_in->stride[0], half.rank, half.width, x.panels, n, x);
      for (int64_t r = 0; r < half.rank; r += LANES)
        transpose_rows(x.products + r * TOKEN_TILE, TOKEN_TILE, least<int64_t>(LANES, half.rank - r), n, x.inner + r,
                       row_ld);
    }
    rows = x.inner, width = half.rank;
  }
  if (half.proj->data && !stream) pack_panels_transposed(x.panels, rows, row_ld, width, n);
  for (int64_t head = first_head; head < last_head; ++head) {
    const float *bias = nullptr;
    if (half.bias->data) {
      widen_row(x.bias, half.bias->dtype, at(*half.bias, head), half.out_dim);
      bias = x.bias;
    }
    const int64_t out_ld = round_up(half.out_dim, PANEL);
    if (half.proj->data && stream)
      dot_weights(rows, row_ld, n, half.proj->dtype, at(*half.proj, head), half.proj->stride[1], half.out_dim, width,
                  x.products, out_ld, at(*half.proj, head + 1));
    else if (half.proj->data)
      multiply(*half.proj, at(*half.proj, head), half.proj->stride[1], half.out_dim, width, x.panels, n, x);
    for (int64_t first = 0; first < n; first += LANES) {
      const int64_t count = least<int64_t>(LANES, n - first);
      const float *from = x.products + first * out_ld;
      int64_t from_ld = out_ld;
      if (!half.proj->data) {
        from = rows + first * ld + head * half.dim;
        from_ld = ld;
      } else if (!stream) {
        for (int64_t d = 0; d < half.out_dim; d += LANES)
          transpose_rows(x.products + d * TOKEN_TILE + first, TOKEN_TILE, least<int64_t>(LANES, half.out_dim - d),
                         count, x.turned + d, out_ld);
        from = x.turned;
      }
      for (int64_t t = 0; t < count; ++t) {
        memcpy(x.row, from + t * from_ld, half.out_dim * sizeof(float));
        write_row(p, half, b, head, j + first + t, x.row, bias, x.tables);
      }
    }
  }
}
