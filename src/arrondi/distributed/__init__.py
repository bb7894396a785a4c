"""Small messages between machines: gradients and weights that travel in few bits, on `torch.distributed`.

`scripts` holds the algorithms, each once, as programs that ask for exchanges; `links` carries the exchanges out on process groups
and counts their bytes, `simulate` does so for any number of ranks in one process. `ddp` and `fsdp` put them into PyTorch's own
data parallelism, `schemes` lists them, `traffic` is their arithmetic.
"""
