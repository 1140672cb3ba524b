"""What saved workflows and other programs rely on: ids, and texts for every input and output."""

STORAGE = "memory_gb memory_device memory_dtype"
REUSE = "reuse_interval reuse_weight reuse_start_percent reuse_end_percent reuse_blocks"
PRESET = (
    f"preset closeness start_percent end_percent feature_reuse reuse_depth {STORAGE} learn found_policy {REUSE} "
    "published"
)
METHOD = "method preset closeness interval published score_mixing start_percent end_percent learn found_policy policy"
GUIDANCE = (
    "interval tolerance forecast weights start_percent end_percent radius bands alpha_low alpha_high switch_percent "
    "released"
)
IDS = {
    "FasterCache": (f"model {PRESET}", "cached_model"),
    "FasterCacheCFG": (f"model {GUIDANCE}", "cached_model"),
    "FasterCacheGuider": (f"model positive negative cfg {GUIDANCE}", "guider"),
    "FasterCacheKSampler": (
        f"model seed steps cfg sampler_name scheduler positive negative latent_image denoise {METHOD}",
        "latent report",
    ),
    "FasterCacheFRDiff": (
        f"model policy interval score_mixing bias slope other_model start_percent end_percent {STORAGE} skip_last",
        "cached_model",
    ),
    "FasterCacheAutoFR": (
        "model positive negative latent_image seed steps cfg sampler_name scheduler denoise budget "
        "method pictures features",
        "policy report curve",
    ),
    "FasterCachePolicySave": ("policy filename", "path"),
    "FasterCachePolicyLoad": ("filename", "policy text"),
    "FasterCacheReport": ("model latent", "chart text json"),
    "FasterCacheCompare": ("reference other", "psnr ssim difference text"),
}


def test_ids_stay_as_they_are(schemas):
    """Workflows store nodes by id and widgets by position: add new inputs at the end, rename nothing."""
    found = {
        name: tuple(" ".join(entry.id for entry in side) for side in (schema.inputs, schema.outputs))
        for name, schema in schemas.items()
    }
    assert found == IDS


def test_everything_has_a_name_and_a_text(schema):
    assert schema.node_id.startswith("FasterCache") and schema.display_name and schema.description
    for entry in (*schema.inputs, *schema.outputs):
        assert entry.tooltip and entry.tooltip.endswith("."), entry.id


def test_tooltips_are_short(schema):
    """Details belong into the help page of the node."""
    assert [entry.id for entry in schema.inputs if len(entry.tooltip) > 95] == []


def test_ids_are_unique_over_inputs_and_outputs(schema):
    """ComfyUI up to 0.3.75 refuses the whole pack otherwise."""
    ids = [entry.id for entry in (*schema.inputs, *schema.outputs)]
    assert len(ids) == len(set(ids))


def test_outputs_are_named_in_the_page(schema):
    """An output without a display name is shown as its type."""
    assert all(entry.display_name for entry in schema.outputs)
