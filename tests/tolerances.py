"""Every tolerance of the tests, in one place, each with its reason. Native against the contract has none: it is ==."""

# --- arithmetic ---

# contract.exp against exp in float64: 2.1e-8 of the polynomial and half a unit in the last place (6e-8) of the last
# rounding, with a little of the roundings before it. Measured: 8.9e-8.
EXP_RELATIVE = 1.0e-7
# Weights of experts against softmax in float64: a difference of logits up to 87 is rounded (87 * 6e-8, which is a share
# of its exp), and so is each step of a sum of up to 64. Measured: 6e-7.
ROUTE_RELATIVE = 1.0e-5

# --- the float32 program ---

# Against transformers in float32: the same sums in another order, over a few layers. Measured: 8e-6 of logits up to 8.
ORACLE_LOGITS = 5e-5
# transformers against its own kept answers: another torch, another CPU, the same sums in another order.
ORACLE_AGAIN = 2e-5

# --- the contract against float32, as share of the largest logit ---

# Weights stored as floats are not quantised: what is left is float16 in the KV cache, 11 bits.
FLOAT_WEIGHTS_SHARE = 2e-3
# Activations of 8 bits, two layers of random weights: measured up to 0.034. A block or a group of weights that is lost
# gives 0.23 to 1.2.
QUANTISED_SHARE = 0.06

# --- real models against llama.cpp ---

# Log-probability of the likeliest first token: the bound of shared/golden/README.md. llama.cpp quantises activations
# too, in other blocks: float32 itself differs from it by up to 0.29 (gemma3-270m, the Japanese prompt). So up to two of
# eight rows may lie outside, if they are near to float32 instead.
GOLDEN_TOP_LOGPROB = 0.15
TOP_LOGPROB_FROM_FLOAT32 = 0.2  # measured: 0.18 at most
# Perplexity over 16 windows: the bound of the same page.
GOLDEN_PERPLEXITY_SHARE = 0.01
# Mean share of greedy ids before the first fork, eight prompts. Where two tokens are nearly as likely either engine may
# take either: measured 0.50, 0.22 and 0.66, and 0.52, 0.42 and 0.59 for float32. One that forks at once has 0.
CONTINUATION_AGREEMENT = 0.15
# By how much the golden token may be less likely than ours where they fork, in nats. Measured: 0.76 once, 0.3 else.
FORK_GAP = 1.0

# --- real models against float32 ---

# Mean KL divergence, nats a token; measured 3.4e-3, 2.0e-3 and 0.6e-3. Int8 activations cost a small model more.
KL_FROM_FLOAT32 = {"smollm2-135m": 5e-3, "gemma3-270m": 3.5e-3, "qwen2.5-coder-0.5b": 1.2e-3}
# Share of positions where both find the same token likeliest.
TOP1_AGREEMENT = 0.9

# --- neurons ---

# Share of neurons of a layer that fire, over some 10000 tokens: the golden shares are of another stretch of the text.
ZERO_SHARE = 0.01
# What rounding Q4_0 by neuron to Q8_0 by output moves, as share of the weights: a step is the largest of 32 normal
# weights over 127, and a share of it, 1 over the root of 12, the mean change. Measured: 5.0e-3.
REQUANTISED_SHARE = 0.006

# Recall and share of predicted neurons, measured with the kernels' sums in another order than theirs: a score on the
# threshold may fall on either side. Measured: one of 524288 did.
PREDICTED_SHARE = 1e-3
