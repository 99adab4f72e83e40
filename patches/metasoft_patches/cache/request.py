"""What MetaSoft knows about one request; attached to SGLang's ``Req`` as ``req.metasoft``."""

from array import array

from metasoft_patches.cache.prefix_index import CompressedPrefix, Found
from sglang_metasoft.config import NO_COMPRESSION, MetaSoftConfig
from sglang_metasoft.pipeline.plan import plan_span
from sglang_metasoft.types import Bypass, BypassLifetime, Plan


class RequestState:
    """A request as a sequence of logical tokens, prompt and outputs, and what of it is, and is to be, compressed.

    Three counts differ once a part is compressed: logical tokens, which positions, plans and reports go by; entries of
    the row, fewer by ``offset``; and SGLang's ids, one for each entry. In compact form the ids of the compressed prefix
    are replaced by a prefix of virtual ids; only the radix tree and the scheduler's bookkeeping ever see those.
    """

    def __init__(self, req, options: dict, sliding_window_tokens: int | None = None) -> None:
        """
        Args:
            options: its own settings.
            sliding_window_tokens: of the served model, as :func:`sglang_metasoft.pipeline.plan.plan_span` takes them.
        """
        self.sliding_window_tokens = sliding_window_tokens
        self.named_boundary: int | None = options.get("boundary")
        self.options = {name: value for name, value in options.items() if name != "boundary"}
        self.bypasses: dict[BypassLifetime, Bypass] = {}
        if NO_COMPRESSION in self.options.values():
            self.set_bypass(Bypass.OPTED_OUT, BypassLifetime.REQUEST)
        self.restarts = 0  # because its next chunk did not fit
        self.takes_raw_prefix = True  # of the tree, after its prefix
        self.avoids_host = False  # in its next match: the last load-back was declined
        self.declined_load_backs = 0
        self.prompt_ids: array = req.origin_input_ids
        self.compact_ids: array | None = None
        self.compressed: CompressedPrefix | None = None
        self.reused_prefix: CompressedPrefix | None = None  # the part of it that was there before
        self.plan: Plan | None = None
        # Logical tokens at which other prompts leave this one: named by the client, or seen when it was matched.
        self.boundary_tokens = self.named_boundary
        # No span may pass it: the log-probabilities of the tokens from here on are asked for.
        self.end_limit_tokens: int | None = None
        self.generation = 0  # of the weights that its KV is computed with
        self.reused_tokens = 0
        self.reused_host_tokens = 0  # of these, what was loaded back from the host pool
        self.is_reuse_counted = False
        self._raw_logprob_start: int | None = None

    @property
    def compressed_tokens(self) -> int:
        """Prompt tokens that are compressed."""
        return self.compressed.tokens if self.compressed else 0

    @property
    def compressed_slots(self) -> int:
        """Entries that they became."""
        return self.compressed.slots if self.compressed else 0

    @property
    def offset(self) -> int:
        """Logical position minus row index, for every token after the prefix."""
        return self.compressed.offset if self.compressed else 0

    def split_offset(self, device_slots: int) -> tuple[int, int]:
        """The offset, by where the compressed prefix was found: segments wholly on the device, and the others.

        Args:
            device_slots: entries that were matched on the device.
        """
        prefix = self.compressed
        while prefix is not None and prefix.slots > device_slots:
            prefix = prefix.parent
        on_device = prefix.offset if prefix else 0
        return on_device, self.offset - on_device

    def decline_load_back(self) -> None:
        """Note that what the request was to find on the host was not loaded; it has not been admitted."""
        self.avoids_host = True
        self.declined_load_backs += 1

    @property
    def compressed_lengths(self) -> dict[str, int]:
        """Of the whole prefix and of its reused part, as :func:`sglang_metasoft.pipeline.plan.plan_span` takes them."""
        return {
            "compressed_tokens": self.compressed_tokens,
            "compressed_slots": self.compressed_slots,
            "reused_tokens": self.reused_prefix.tokens if self.reused_prefix else 0,
            "reused_slots": self.reused_prefix.slots if self.reused_prefix else 0,
        }

    def logical_ids(self, req) -> array:
        """Token ids of the whole sequence: the prompt as it came and, of a request that continues, its outputs."""
        return self.prompt_ids + req.output_ids

    @property
    def bypass(self) -> Bypass | None:
        """Why something of it is not compressed."""
        return self.bypasses[max(self.bypasses)] if self.bypasses else None

    @property
    def is_bypassed(self) -> bool:
        """Whether nothing more of it will be compressed, unless it is scheduled anew."""
        return any(lifetime >= BypassLifetime.SCHEDULE for lifetime in self.bypasses)

    def set_bypass(self, reason: Bypass, lifetime: BypassLifetime) -> None:
        """Note why the request, or a part of it, is not compressed; the first reason for a whole request stays."""
        if lifetime is BypassLifetime.REQUEST:
            self.bypasses.setdefault(lifetime, reason)
        else:
            self.bypasses[lifetime] = reason
        if lifetime is BypassLifetime.SCHEDULE:
            self.plan = None

    @property
    def namespace_options(self) -> tuple:
        """The per-request settings that separate prefixes."""
        return tuple(sorted(self.options.items()))

    def owns_prompt(self, req) -> bool:
        """Whether the request's prompt is still the one we know (SGLang replaces it when it rejects a request)."""
        ours = self.prompt_ids if self.compressed is None else self.compact_ids
        return req.origin_input_ids is ours

    def adopt_prompt(self, req) -> None:
        """Take the request's prompt as the raw one, if it was changed (truncated) after arrival."""
        if self.compressed is None and req.origin_input_ids is not self.prompt_ids:
            self.prompt_ids = req.origin_input_ids

    def use_prefix(self, req, prefix: CompressedPrefix) -> None:
        """Switch the request to compact form."""
        self.restore_raw(req)
        self.set_compressed(req, prefix)
        self.reused_prefix = prefix
        req.origin_input_ids = self.compact_ids
        req.full_untruncated_fill_ids = array("q")

    def set_compressed(self, req, prefix: CompressedPrefix) -> array:
        """Note the prefix and return the compact prompt; the caller installs it."""
        self.compressed = prefix
        self.compact_ids = prefix.virtual_ids + self.prompt_ids[prefix.tokens :]
        if self._raw_logprob_start is None:
            self._raw_logprob_start = req.logprob_start_len
        if self._raw_logprob_start >= 0:
            req.logprob_start_len = self._raw_logprob_start - prefix.offset
        return self.compact_ids

    def restore_raw(self, req) -> None:
        """Switch the request back to raw form, unless SGLang has replaced its prompt meanwhile."""
        if self.compressed is None:
            return
        if self.owns_prompt(req):
            req.origin_input_ids = self.prompt_ids
            req.full_untruncated_fill_ids = array("q")
            req.logprob_start_len = self._raw_logprob_start
        self._raw_logprob_start = None
        self.compressed = self.reused_prefix = None
        self.compact_ids = None

    def make_plan(self, config: MetaSoftConfig, page_size: int, prompt_tokens: int | None = None) -> None:
        """Plan the next span, for the whole prompt or for its first ``prompt_tokens``.

        Once any part of the prompt is compressed, "too short" only means that the rest is not worth a segment yet.
        """
        self.plan = None
        if self.is_bypassed:
            return
        plan = plan_span(
            config,
            prompt_tokens=len(self.prompt_ids) if prompt_tokens is None else prompt_tokens,
            page_size=page_size,
            whole_tokens=len(self.prompt_ids),
            **self.compressed_lengths,
            boundary_tokens=self.boundary_tokens,
            end_limit_tokens=self.end_limit_tokens,
            sliding_window_tokens=self.sliding_window_tokens,
            options=self.options,
        )
        if isinstance(plan, Plan):
            self.plan = plan
            self.bypasses.pop(BypassLifetime.PLAN, None)
        else:
            self.set_bypass(plan, BypassLifetime.PLAN)

    def update_boundary(self, matched_tokens: int, found: Found, page_size: int) -> None:
        """Set the boundary to where this prompt leaves earlier ones, unless the client named one.

        Args:
            matched_tokens: what the tree holds of this prompt.
            found: what the index knows of it.
            page_size: slots of a pool page.
        """
        if self.named_boundary is not None:
            return
        # The tree knows outputs and uncompressed prompts too; but one that holds all that it may match is a repeat.
        is_parted_in_tree = matched_tokens < (len(self.prompt_ids) - 1) // page_size * page_size
        if matched_tokens > found.seen_tokens and is_parted_in_tree:
            self.boundary_tokens = matched_tokens
        else:
            self.boundary_tokens = found.parting_tokens or None

    def probed_tokens(self, plan: Plan, row_end: int) -> int:
        """Logical tokens that the probe of a span sees: up to the boundary that it ends at, else the whole row.

        Args:
            row_end: entries in the request's row.
        """
        if plan.ends_at_boundary:
            return self.offset + plan.end_slots
        return self.offset + row_end

    def restart(self, req) -> None:
        """Forget everything that happened to the request's KV, after SGLang released it."""
        self.restore_raw(req)
        self.plan = None
        self.bypasses = {
            lifetime: reason for lifetime, reason in self.bypasses.items() if lifetime is BypassLifetime.REQUEST
        }
        self.takes_raw_prefix = True
        self.boundary_tokens = self.named_boundary

    def report(self) -> dict:
        """The flat ``meta_info`` fields of the response, some of ``headers.REPORT_FIELDS``."""
        fields: dict[str, int | str] = {
            "metasoft_span_tokens": self.compressed_tokens,
            "metasoft_kv_tokens": len(self.prompt_ids) - self.offset,
            "metasoft_reused_tokens": self.reused_tokens,
        }
        if self.compressed_tokens == 0:
            fields["metasoft_bypass"] = (self.bypass or Bypass.TOO_SHORT).value
        return fields
