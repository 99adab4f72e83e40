"""What keeps prefixes of different clients, settings and weights apart."""

from metasoft_patches.adapter import Adapter


class Namespaces:
    """One per scheduler process.

    Args:
        adapter: of this SGLang.
        settings_id: compressions under other settings are other content.
    """

    def __init__(self, adapter: Adapter, settings_id: str) -> None:
        self.adapter = adapter
        self.settings_id = settings_id
        self.generation = 0  # of the model's weights

    def tenant(self, req) -> tuple:
        """What separates raw prefixes: the client's own keys, and with them SGLang keeps the LoRA adapter."""
        return self.adapter.tenant(req)

    def namespace(self, req) -> tuple:
        """What separates compressed prefixes: tenant, settings, and the weights that the KV was computed with.

        An adapter's id is a new one each time that it is loaded.
        """
        state = req.metasoft
        return (self.settings_id, state.generation, req.lora_id, *self.tenant(req), state.namespace_options)
