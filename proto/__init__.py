"""Protocol buffers and the stubs generated from them."""
