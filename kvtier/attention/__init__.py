"""What a page means to attention without its keys: digests (`digest`), where they are kept (`store`), the pages they choose (`select`)."""
