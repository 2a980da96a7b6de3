"""A decoder of a known family without transformers: modules, paths and numbers, no forward pass.

`outline.py` notes what transformers made of a config.json, `model.py` builds that again with empty
places for the tensors. `base.fused` runs it. transformers takes seconds to import, and a server
whose base is kept on disk (`base.kept`) needs nothing else of it.
"""
