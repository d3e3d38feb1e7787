# Sourced by run.sh: the students of the comparison, scaled down to its teacher (6 layers of width 256) and to 125 to 132 million
# MACs per second of audio: two layers of the teacher and its extractor cost 127. Losses, heads and attention are the recipes';
# run.sh gives all of them the same optimizer, batches and no dropout.

ALL_STUDENTS="distilhubert three_layer_one twelve_layer_half fithubert lighthubert_small star_hubert armhubert_s albert windowed linformer separable dphubert"

# Shapes of the teacher's extractor, and of FitHuBERT's, which the papers after it took over.
EXTRACTOR="[(40, 10, 5)] + [(40, 3, 2)] * 4 + [(40, 2, 2)] * 2"
THIN_EXTRACTOR="[(16, 10, 5), (32, 1, 1)] + [(32, 3, 2)] * 4 + [(40, 1, 1)] + [(40, 2, 2)] * 2"

# shape_of NAME: sets `shape`, the overrides that scale the recipe NAME down
shape_of() {
    local every="'1,2,3,4,5,6'" three="'2,4,6'" tenths="'0.1,0.1,0.1,0.1,0.1,1.0'" sixths="'0.1667,0.1667,0.1667,0.1667,0.1667,0.1667'"
    local random=("model.encoder_layers=6" "model.encoder_attention_heads=4" "model.conv_pos=32")
    case $1 in
    distilhubert) # two layers of the teacher, heads for three
        shape=("model.distill_layers=$three") ;;
    three_layer_one) # here two, one head each
        shape=("model.init_layers='first:2'" "model.distill_layers='1:3,2:6'" "criterion.layer_weights=''") ;;
    twelve_layer_half) # all layers, at half the width
        shape=("${random[@]}" "model.encoder_embed_dim=128" "model.encoder_ffn_embed_dim=640" "model.distill_layers=$every"
            "criterion.layer_weights=$sixths") ;;
    fithubert) # at 25 frames per second the same MACs buy more width
        shape=("${random[@]}" "model.encoder_attention_heads=8" "model.encoder_embed_dim=288" "model.encoder_ffn_embed_dim=352"
            "model.conv_feature_layers='$THIN_EXTRACTOR'" "model.distill_layers=$every" "criterion.layer_weights=$tenths") ;;
    lighthubert_small) # masked distillation of the shape of twelve_layer_half
        shape=("${random[@]}" "model.encoder_embed_dim=128" "model.encoder_ffn_embed_dim=640" "model.distill_layers=$three") ;;
    star_hubert) # temporal relations, no heads
        shape=("${random[@]}" "model.encoder_embed_dim=144" "model.encoder_ffn_embed_dim=544"
            "model.conv_feature_layers='$THIN_EXTRACTOR'" "criterion.temporal_layers=$every") ;;
    armhubert_s) # every second layer reuses an attention map
        shape=("${random[@]}" "model.encoder_embed_dim=160" "model.encoder_ffn_embed_dim=544" "model.reuse_attention_layers=[1,3,5]"
            "model.conv_feature_layers='$THIN_EXTRACTOR'" "model.distill_layers=$every" "criterion.layer_weights=$tenths") ;;
    albert) # two layers of the teacher's width with one layer's parameters
        shape=("${random[@]}" "model.encoder_layers=2" "model.encoder_attention_heads=8" "model.encoder_embed_dim=256"
            "model.encoder_ffn_embed_dim=1024" "model.distill_layers='1:3,2:6'") ;;
    windowed)
        shape=("${random[@]}" "model.encoder_embed_dim=160" "model.encoder_ffn_embed_dim=720" "model.attention_window=25"
            "model.distill_layers=$three") ;;
    linformer)
        shape=("${random[@]}" "model.encoder_embed_dim=160" "model.encoder_ffn_embed_dim=672" "model.linformer_dim=64"
            "model.distill_layers=$three") ;;
    separable)
        shape=("${random[@]}" "model.encoder_embed_dim=144" "model.encoder_ffn_embed_dim=640"
            "model.conv_feature_layers='$EXTRACTOR'" "model.distill_layers=$three") ;;
    *)
        echo "no student $1; there are $ALL_STUDENTS" >&2
        return 2 ;;
    esac
}
