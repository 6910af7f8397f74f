"""The backends, which compute the attention of image queries on a plan.

Each backend is one function, and an entry of `selection.BACKENDS`:

    attend(query, key, value, region, key_bias, scale, return_lse) -> (output, lse or None)

- query: `[batch, heads, tokens, head_dim]`, all tokens, with the image tokens in tile order.
- key, value: `[batch, key heads, key tokens, head_dim]`, in the region's order of keys. Key heads divide heads.
- key_bias: the bias on the scaled scores of each key, `[batch, key tokens]`, or None.
- output: in the shape of the query. Only the image rows are set; the caller writes the text rows into the same tensor.
- lse: `[batch, heads, tokens]`, at least float32, with only the image rows set. It is the log-sum-exp of the scores of
  each query, with which results over parts of the keys can be merged exactly.
"""
