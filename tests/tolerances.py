"""Every tolerance of the tests, in one place, each with its reason. Native against the contract has none: it is ==."""

# --- arithmetic ---

# contract.exp against exp in float64: 2.1e-8 of the polynomial and half a unit in the last place (6e-8) of the last
# rounding, with a little of the roundings before it. Measured: 8.9e-8.
EXP_RELATIVE = 1.0e-7

# --- the float32 program ---

# Against transformers in float32: the same sums in another order, over a few layers. Measured: 8e-6 of logits up to 8.
ORACLE_LOGITS = 5e-5
# transformers against its own kept answers: another torch, another CPU, the same sums in another order.
ORACLE_AGAIN = 2e-5

# --- the contract against float32, as share of the largest logit ---

# Weights stored as floats are not quantised: what is left is float16 in the KV cache, 11 bits.
FLOAT_WEIGHTS_SHARE = 2e-3
# Activations of 8 bits into random weights of 256 columns: 1 / 127 of a block's largest, several times over. Measured
# up to 0.034 on these models; a wrong scale or a lost group shows as 0.2 and more.
QUANTISED_SHARE = 0.06

# --- real models against llama.cpp ---

# Log-probability of the likeliest first token. llama.cpp quantises activations in other blocks and rounds elsewhere;
# shared/golden/README.md gives this bound.
GOLDEN_TOP_LOGPROB = 0.15
# Perplexity over 16 windows: the same source.
GOLDEN_PERPLEXITY_SHARE = 0.01
# Mean share of greedy ids before the first fork, eight prompts of 48 tokens. Where two tokens are almost tied either
# engine may take either; an engine that is wrong forks within the first tokens of most prompts.
CONTINUATION_AGREEMENT = 0.5

# --- real models against float32 ---

# Mean KL divergence, nats a token. Measured with one activation scale per 32 columns: 3.4e-3 on SmolLM2-135M.
KL_FROM_FLOAT32 = 6e-3
# Share of positions where both find the same token likeliest.
TOP1_AGREEMENT = 0.9
