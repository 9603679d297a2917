"""Whether an engine would load a checkpoint, told from its headers and its config: no GPU, no engine, no weights.

Engines load wrong files without a word: a name that nobody reads is dropped, a parameter that nobody fills keeps whatever memory held. What an engine does follows from its code, so it can be
played through: build the modules that its classes build from the config (`network`), decide for each how it is quantized (`vllm_schemes`, `sglang_schemes`; in formats of other writers `vllm_others`, `sglang_others`, `transformers_others`), allocate the
parameters of that (`parameters`), hand it every stored tensor by its rules for names (`vllm`, `sglang`, `transformers`, with what they share in `placing`), and see what is left over on either side (`replay`). Then compare what is joined
(`agreement`) and say it in plain words (`findings`).

Which engine reads a format at all is told in `reading`. The rules of an engine are a table of its own, for the versions named there, each with the file and function of the engine's public repository that it was read in. vLLM's is held against vLLM itself in
`tests/loading/test_vllm_agreement.py`.
"""
