"""``sglang-metasoft doctor``: will it work on this machine, with this model?"""
