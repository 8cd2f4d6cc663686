// Functions of one number and of two, element by element.

// The order of `BINARY` in row_launches.
enum Binary_ { REGLU, GEGLU, SWIGLU, SWIGLU_OAI, GEGLU_ERF, GEGLU_QUICK, SWIGLU_CLAMP, ADD, SUB, MUL, DIV };

// What is no number stays so.
DEVICE float at_least(float x, float low) { return x < low ? low : x; }
DEVICE float at_most(float x, float high) { return x > high ? high : x; }

DEVICE float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }
DEVICE float silu(float x) { return x / (1.0f + expf(-x)); }
DEVICE float gelu_quick(float x) { return x / (1.0f + expf(-1.702f * x)); }
DEVICE float gelu_erf(float x) { return 0.5f * x * erfcf(-0.70710678f * x); }

// (1 + tanh u) / 2 is the sigmoid of 2u, without the difference of near numbers.
DEVICE float gelu(float x) { return x / (1.0f + expf(-1.5957691f * x * (1.0f + 0.044715f * x * x))); }

#define EACH(expression)              \
    _Pragma("unroll")                 \
    for (int j = 0; j < 4; j++) {     \
        float x = v[j], z = w[j];     \
        v[j] = (expression);          \
    }                                 \
    break

DEVICE void combine(int kind, float p0, float p1, float (&v)[4], const float (&w)[4]) {
    switch (kind) {
        case ADD: EACH(x + z);
        case SUB: EACH(x - z);
        case MUL: EACH(x * z);
        case DIV: EACH(x / z);
        case REGLU: EACH(at_least(x, 0.0f) * z);
        case GEGLU: EACH(gelu(x) * z);
        case SWIGLU: EACH(silu(x) * z);
        case GEGLU_ERF: EACH(gelu_erf(x) * z);
        case GEGLU_QUICK: EACH(gelu_quick(x) * z);
        case SWIGLU_OAI:
            EACH(at_most(x, p1) * sigmoid(p0 * at_most(x, p1)) * (1.0f + at_most(at_least(z, -p1), p1)));
        case SWIGLU_CLAMP: EACH(silu(at_most(x, p1)) * at_most(at_least(z, -p1), p1));
    }
}

#undef EACH
