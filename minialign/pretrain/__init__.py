"""How the shipped weights were made: one file a set, `minialign pretrain NAME`.

    assistant     the GPT-2 of the world `assistant`
    digits        the class-conditional UNet2DModel of the world `digits`
    edm           EDM networks: `digits_edm` and `patches`
    shapes        Stable Diffusion in miniature and its scorer; their modules in shapes_models
    shapes_lcm    its consistency twin, distilled from it
    formats       no set: savers whose files transformers 4 and 5 both read

Each has a `Recipe`, whose numbers all enter the card, and `main(out, seed, recipe, report)`, which is deterministic and
writes all or nothing.
"""
