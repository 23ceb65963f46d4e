"""The operators around the linears: norm, SwiGLU, rotary embedding, loss and optimizer, each with its plain-torch twin."""
