// A softmax over cells that are taken a piece at a time. Scores carry the factor log2(e), so weights are powers of two.

#define LOG2E 1.4426950408889634f
#define CELLS 64

// What is kept is multiplied by this when the peak rises from `old`; 1 where it stays, also where nothing has been seen.
DEVICE float rescaled(float old, float peak) { return old == peak ? 1.0f : exp2f(old - peak); }

DEVICE float weight(float score, float peak) { return exp2f(score - (peak == -INFINITE ? 0.0f : peak)); }

DEVICE float capped(float score, float cap) { return cap != 0.0f ? cap * tanhf(score / cap) : score; }

// What a sum of values is multiplied by in the end. A sink takes part in the sum of weights and gives nothing.
DEVICE float finishing(float peak, float sum, const float* sink) {
    float factor = 1.0f;
    if (sink) {
        float score = *sink * LOG2E, top = fmaxf(peak, score);
        factor = rescaled(peak, top);
        sum = fmaf(sum, factor, weight(score, top));
    }
    return sum == 0.0f ? 0.0f : factor / sum;
}

// The cells of a sequence that a token sees, begin to end; none where a number points outside.
struct Seen {
    i64 begin, end;
};

DEVICE Seen seen_of(i64 n_seen, i64 n_pages, i64 window) {
    if (n_seen < 0 || n_seen > CELLS * n_pages) return {0, 0};
    return {window > 0 && window < n_seen ? n_seen - window : 0, n_seen};
}
