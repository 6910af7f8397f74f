"""The ways to compute the attention of image queries on a plan.

Each backend is one function:

    attend(query, key, value, region, key_bias, scale, return_lse) -> (output, lse or None)

query: `[batch, heads, tokens, head_dim]`, of all tokens, those of the image in tile order. key, value: `[batch, key
heads, key tokens, head_dim]` in the region's order of keys; key heads divide heads. key_bias: `[batch, key tokens]`,
added to the scaled scores, or None. output: as query; only the image's rows are set, the text's are for the caller to
write, so that one tensor serves both. lse: `[batch, heads, tokens]`, likewise, float32 at least, the log-sum-exp of the
scores of the keys that each query attends to: with it, results over parts of the keys merge exactly.
"""
