"""The tensor arithmetic of each compression stage, on plain tensors; no SGLang in here.

Every stage is a folder with ``naive.py``: fp32, obvious, the oracle for faster versions and the CPU path.
Letters in shapes: t probe tokens, C context entries, S span entries, B kept, N = S - B dropped, m targets of
a dropped entry, H query heads, G KV heads, r = H / G, d head size.
"""
