"""Which calls a module gets, what their tensors are called and which axes may vary."""
