"""Bugs put in on purpose, one at a time, and the fast tests that must fail for each (run.py).

They stand for what is easily got wrong in a rewrite: a sign, a border, a swapped pair, a term left out. The
first nine were all in the tree at once while 263 tests passed. Every `old` occurs once in its file
(test_mutants.py), so that the list cannot fall behind the code.
"""

from dataclasses import dataclass

# ---- tests, the cheapest that may know ---------------------------------------------------------------------

SLOW_GENSR = "tests/parity/test_slow_gensr.py"
DECODER = f"{SLOW_GENSR}::test_scores_losses_and_gradients[prepared-extended-compact-scratch:llama_nano]"
WORDS = f"{SLOW_GENSR}::test_scores_losses_and_gradients[prepared_words-extended-compact-scratch:nano]"
STEPS = f"{SLOW_GENSR}::test_training_steps[extended]"
SLOW_EVIDENCE = "tests/parity/test_slow_evidence.py"
COUNTS = f"{SLOW_EVIDENCE}::test_counts[text]"
NUMBERS = f"{SLOW_EVIDENCE}::test_numbers_of_every_item[text-training]"
EVIDENCE_LOSS = f"{SLOW_EVIDENCE}::test_a_models_scores_losses_and_gradients[text]"
ALLOWED = f"{SLOW_EVIDENCE}::test_what_is_mined_is_allowed[text]"
OFTEN = f"{SLOW_EVIDENCE}::test_mined_items_come_as_often_as_the_correction_says[text]"
CORRECTION = f"{SLOW_EVIDENCE}::test_the_correction_of_every_item[text]"
MODEL = "tests/parity/test_model.py"
SOFT_FILTER = f"{MODEL}::test_soft_filter_equals_a_double_loop"
PADDING = f"{MODEL}::test_history_encoder_masks_padding"
SLOTS = f"{MODEL}::test_prompt_holds_five_segments_around_four_slots"
METRICS = "tests/unit/test_metrics.py"
PAIRED = "tests/unit/test_paired.py"
EVALUATE = "tests/unit/test_evaluate.py"
PLAN = "tests/unit/test_plan.py"
SAMPLING = "tests/unit/test_sampling.py"
DATA = "tests/unit/test_data.py"
ORDER = "tests/unit/test_order.py"
DATA_STEPS = "tests/unit/data_shards/test_steps.py"
REFERENCE = "tests/unit/data_shards/test_reference.py"
HARD = "tests/unit/data_shards/test_hard_negatives.py"
DRAWS = "tests/unit/data_shards/test_determinism.py"
UNISAR_PAIRS = "tests/unit/models/test_unisar.py"
USER_TESTS = "tests/unit/models/test_user.py"
NOTHING_SEEN = "tests/unit/models/test_history_ids.py::test_attention_to_nothing_is_zero"
RETRIEVERS = "tests/unit/test_retriever.py"
JOBS = "tests/unit/experiments/test_pool.py"
CORES = f"{JOBS}::test_jobs_share_the_cores"
OWN_PROCESS = f"{JOBS}::test_a_child_is_a_process_of_its_own"

CF_VIEW = "trainer/models/cf_view.py"
HISTORY = "trainer/models/gensr/history.py"
CONTRACT = "trainer/models/contract.py"
GENSR = "trainer/models/gensr/model.py"
EVIDENCE = "trainer/models/gensr/evidence.py"
QUERY_WORDS = "trainer/models/gensr/query_words.py"
MINING = "trainer/models/gensr/mining.py"
AGES = "trainer/models/layers/history.py"
CATEGORIES = "trainer/models/layers/categories.py"
NEIGHBOURS = "trainer/models/layers/neighbours.py"
PROMPT = "trainer/models/gensr/prompt.py"
GROUPING = "trainer/models/gensr/grouping.py"
LANGUAGE = "trainer/models/backbones/language.py"
LOSSES = "trainer/models/losses.py"
RANKS = "trainer/evaluation/metrics.py"
RANKING = "trainer/evaluation/ranking.py"
BOOTSTRAP = "trainer/evaluation/bootstrap.py"
OPTIMIZER = "trainer/training/optimizer.py"
STEP = "trainer/training/step.py"
SCHEDULE = "trainer/training/schedule.py"
SAMPLER = "trainer/data/negatives.py"
STREAM = "trainer/data/train_stream.py"
EVAL_STREAM = "trainer/data/eval_stream.py"
ATTENTION = "trainer/models/layers/attention.py"
CONTRAST = "trainer/models/layers/contrast.py"
USER = "trainer/models/baselines/user.py"
RETRIEVER = "trainer/serving/retriever.py"
POOL = "trainer/experiments/pool.py"
FORKED = "trainer/experiments/forked.py"
STORED = "data_shards/negatives.py"
HISTORIES = "data_shards/histories.py"
SPLIT = "data_shards/split.py"


@dataclass(frozen=True)
class Mutant:
    """One bug. tests: at least one of them must fail. equivalent: why none can, where the change changes
    nothing that a user could notice; then all must pass."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]
    equivalent: str = ""


def mutant(name: str, file: str, old: str, new: str, *tests: str, equivalent: str = "") -> Mutant:
    return Mutant(name, file, old, new, tests, equivalent)


# ---- the nine that once passed together --------------------------------------------------------------------

NINE = [
    mutant(
        "weight decay on everything",
        OPTIMIZER,
        '"weight_decay": 0.0}',
        '"weight_decay": config.weight_decay}',
        STEPS,
    ),
    mutant(
        "no clipping without DeepSpeed",
        STEP,
        "if accelerator.sync_gradients and not uses_deepspeed(accelerator):",
        "if accelerator.sync_gradients and uses_deepspeed(accelerator):",
        STEPS,
    ),
    mutant(
        "task weights swapped",
        CONTRACT,
        "torch.where(batch.task == SRC, data.weight_src, data.weight_rec)",
        "torch.where(batch.task == SRC, data.weight_rec, data.weight_src)",
        DECODER,
    ),
    mutant(
        "HistoryEncoder is the identity",
        HISTORY,
        "return self.layer(items_BNW, src_key_padding_mask=~_never_empty(mask_BN))",
        "return items_BNW",
        DECODER,
    ),
    mutant(
        "age reversed",
        AGES,
        "mask_BN.sum(1, keepdim=True) - 1 - place_N",
        "mask_BN.sum(1, keepdim=True) * 0 + place_N",
        DECODER,
    ),
    mutant(
        "behaviour ignored",
        HISTORY,
        "self.age(ages(mask_BN)) + self.behaviour(tasks_BN)",
        "self.age(ages(mask_BN)) + self.behaviour(tasks_BN * 0)",
        DECODER,
    ),
    mutant(
        "CF product slot is no product",
        GENSR,
        "self.match_cf(f_c_BCK * cand_cf_BCK)",
        "self.match_cf(f_c_BCK + cand_cf_BCK)",
        DECODER,
    ),
    mutant(
        "semantic product slot is no product",
        GENSR,
        "self.match_sem(f_s_BCD * cand_sem_BCD)",
        "self.match_sem(f_s_BCD + cand_sem_BCD)",
        DECODER,
    ),
    mutant(
        "query product slot is no product",
        GENSR,
        "self.match_query(query_BD[:, None] * cand_sem_BCD)",
        "self.match_query(query_BD[:, None] + cand_sem_BCD)",
        DECODER,
    ),
]

# ---- GenSR -------------------------------------------------------------------------------------------------

MODELS = [
    mutant(
        "age of the newest is 1",
        AGES,
        "mask_BN.sum(1, keepdim=True) - 1 - place_N",
        "mask_BN.sum(1, keepdim=True) - place_N",
        DECODER,
    ),
    mutant(
        "history without age",
        HISTORY,
        "self.age(ages(mask_BN)) + self.behaviour(tasks_BN)",
        "self.behaviour(tasks_BN)",
        DECODER,
    ),
    mutant(
        "history encoder reads its padding",
        HISTORY,
        "return self.layer(items_BNW, src_key_padding_mask=~_never_empty(mask_BN))",
        "return self.layer(items_BNW)",
        PADDING,
    ),
    mutant(
        "FFN of another activation",
        HISTORY,
        'activation="gelu"',
        'activation="relu"',
        DECODER,
    ),
    mutant(
        "soft filter without √d",
        HISTORY,
        ".float() / shape[1] ** 0.5",
        ".float() / shape[1]",
        SOFT_FILTER,
    ),
    mutant(
        "soft filter scaled by the whole width",
        HISTORY,
        ".float() / shape[1] ** 0.5",
        ".float() / width**0.5",
        SOFT_FILTER,
    ),
    mutant(
        "soft filter reads its padding",
        HISTORY,
        'scores_BHCN = scores_BHCN.masked_fill(~_never_empty(mask_BN)[:, None, None, :], float("-inf"))',
        "pass",
        SOFT_FILTER,
    ),
    mutant(
        "heads summed, not averaged",
        HISTORY,
        "scores_BHCN.softmax(-1).mean(1)",
        "scores_BHCN.softmax(-1).sum(1)",
        SOFT_FILTER,
    ),
    mutant(
        "softmax over candidates",
        HISTORY,
        "scores_BHCN.softmax(-1).mean(1)",
        "scores_BHCN.softmax(-2).mean(1)",
        SOFT_FILTER,
    ),
    mutant(
        "Eq. 6 without W",
        HISTORY,
        "weights_BCN.to(history_BNW.dtype) @ self.value(history_BNW)",
        "weights_BCN.to(history_BNW.dtype) @ history_BNW",
        DECODER,
    ),
    mutant(
        "an empty history is a zero",
        HISTORY,
        "mask_BN.any(1)[:, None, None], filtered_BCW, self.no_history.to(filtered_BCW.dtype)",
        "mask_BN.any(1)[:, None, None], filtered_BCW, self.no_history.to(filtered_BCW.dtype) * 0",
        DECODER,
    ),
    mutant(
        "views swapped in the prompt",
        GENSR,
        "slots = [f_c_BCD, f_s_BCD, self.cf_projection(cand_cf_BCK), cand_sem_BCD]",
        "slots = [f_s_BCD, f_c_BCD, self.cf_projection(cand_cf_BCK), cand_sem_BCD]",
        DECODER,
    ),
    mutant(
        "candidate slots hold the history",
        GENSR,
        "slots = [f_c_BCD, f_s_BCD, self.cf_projection(cand_cf_BCK), cand_sem_BCD]",
        "slots = [f_c_BCD, f_s_BCD, f_c_BCD, f_s_BCD]",
        DECODER,
    ),
    mutant(
        "No counts as Yes",
        GENSR,
        "(logits_GCA[..., 0] - logits_GCA[..., 1]) * group.counts",
        "(logits_GCA[..., 1] - logits_GCA[..., 0]) * group.counts",
        DECODER,
    ),
    mutant(
        "a recommendation without its no-query vector",
        GENSR,
        "(batch.query >= 0)[:, None, None], match_query, self.no_query.to(match_query.dtype)",
        "(batch.query >= -1)[:, None, None], match_query, self.no_query.to(match_query.dtype)",
        DECODER,
    ),
    mutant(
        "every event reads the full CF table",
        CF_VIEW,
        "if tables.cf_folds.shape[0] == 0 or not model.training:",
        "if True:",
        DECODER,
    ),
    mutant(
        "scoring reads held-out CF tables",
        CF_VIEW,
        "if tables.cf_folds.shape[0] == 0 or not model.training:",
        "if tables.cf_folds.shape[0] == 0:",
        f"{MODEL}::test_an_event_reads_the_table_that_did_not_see_its_click_in_training_only",
    ),
    mutant(
        "an event without a fold reads fold 0",
        CF_VIEW,
        "torch.where((fold_B >= 0)[:, None, None], held_out, tables.cf[items])",
        "torch.where((fold_B >= -1)[:, None, None], held_out, tables.cf[items])",
        f"{MODEL}::test_an_event_reads_the_table_that_did_not_see_its_click_in_training_only",
    ),
    mutant(
        "histories as long as items",
        GENSR,
        "self.semantic_vectors(batch.history_items, self.world.data.history_tokens)",
        "self.semantic_vectors(batch.history_items, self.world.data.item_tokens)",
        DECODER,
    ),
    mutant(
        "items without their words",
        GENSR,
        "vectors = vectors + self._mean_words(rows_of(tables.item_words, items))",
        "pass",
        WORDS,
    ),
    mutant(
        "the query as a sum",
        GENSR,
        "masked_BQD.sum(1) / mask_BQ.sum(1, keepdim=True).clamp(min=1)",
        "masked_BQD.sum(1)",
        DECODER,
    ),
    mutant(
        "contrastive term of the first candidate",
        GENSR,
        "positive = batch.labels.argmax(1)[:, None, None].expand(-1, 1, cf_BCD.shape[2])",
        "positive = 1 - batch.labels.argmax(1)[:, None, None].expand(-1, 1, cf_BCD.shape[2])",
        DECODER,
    ),
    mutant(
        "contrastive term without its weight",
        GENSR,
        "loss = loss + settings.contrastive_weight * contrast",
        "loss = loss + contrast",
        DECODER,
    ),
    mutant(
        "listwise term subtracted",
        GENSR,
        "loss = loss + settings.listwise_weight * listwise",
        "loss = loss - settings.listwise_weight * listwise",
        DECODER,
    ),
    mutant(
        "events without history in Eq. 10",
        GENSR,
        "                batch.history_mask.any(1),\n",
        "                None,\n",
        DECODER,
    ),
    mutant(
        "one query too short",
        GENSR,
        "torch.cat([shared_BPD, query_BQD[:, : group.longest].to(dtype)], 1)",
        "torch.cat([shared_BPD, query_BQD[:, : group.longest].to(dtype) * 0], 1)",
        DECODER,
    ),
    mutant(
        "explain counts padding",
        GENSR,
        "real_B1N = batch.history_mask[:, None]",
        "real_B1N = batch.history_mask[:, None] | True",
        f"{MODEL}::test_explained_weights_are_those_of_the_soft_filter",
    ),
    mutant(
        "both tasks read one wording",
        PROMPT,
        'REC: ("Recommend", ": user", ",", "; item", ",", "?"),',
        'REC: ("Search", ": user", ",", "; item", ",", "?"),',
        DECODER,
    ),
    mutant(
        "an encoder's tasks read one wording",
        PROMPT,
        'REC: ("Recommend", ",", "item", ",", "?"),',
        'REC: ("Search", ",", "item", ",", "?"),',
        WORDS,
    ),
    mutant(
        "Yes and No swapped",
        LANGUAGE,
        "return yes[0], no[0]",
        "return no[0], yes[0]",
        DECODER,
    ),
    mutant(
        "product slots behind a decoder's question",
        PROMPT,
        "    if head:\n",
        "    if not head:\n",
        DECODER,
    ),
    mutant(
        "a group's longest query is its shortest",
        GROUPING,
        "Group(SRC, rows, int(query_length_B[rows[-1:]].sum()))",
        "Group(SRC, rows, int(query_length_B[rows[:1]].sum()))",
        "tests/unit/test_grouping.py",
        MODEL,
    ),
    mutant(
        "searches are answered as recommendations",
        GROUPING,
        "groups = [Group(REC, (task_B == REC).nonzero()[:, 0], longest=0)]",
        "groups = [Group(SRC, (task_B == REC).nonzero()[:, 0], longest=0)]",
        DECODER,
    ),
]

# ---- evidence and mined negatives --------------------------------------------------------------------------

COUNTED = [
    mutant(
        "own click stays among an item's users",
        EVIDENCE,
        "users_BC = self.users[batch.candidates] - leaves_BC",
        "users_BC = self.users[batch.candidates]",
        NUMBERS,
    ),
    mutant(
        "own click stays among an item's clicks",
        EVIDENCE,
        "clicks_BC = self.clicks[batch.candidates] - is_own_BC.float()",
        "clicks_BC = self.clicks[batch.candidates]",
        NUMBERS,
    ),
    mutant(
        "own click stays among the neighbours",
        EVIDENCE,
        "common_BNC = (common_BNC - leaves_BC[:, None]).clamp(min=0)",
        "common_BNC = common_BNC.clamp(min=0)",
        NUMBERS,
    ),
    mutant(
        "own click stays among the followers",
        EVIDENCE,
        "after_BNC = (after_BNC - own_followers(batch)[..., None] * is_own_BC[:, None]).clamp(min=0)",
        "after_BNC = after_BNC.clamp(min=0)",
        NUMBERS,
    ),
    mutant(
        "own click keeps a candidate among the nearest",
        EVIDENCE,
        "return before_BNC | ~is_own_BC[:, None]",
        "return torch.ones_like(before_BNC)",
        NUMBERS,
    ),
    mutant(
        "own click stays in its category",
        EVIDENCE,
        "self.category_users[category_BC] - leaves_BC",
        "self.category_users[category_BC]",
        NUMBERS,
    ),
    mutant(
        "the first category instead of the last",
        CATEGORIES,
        "last = ((paths > 0).sum(-1, keepdim=True) - 1).clamp(min=0)",
        "last = torch.zeros_like(paths[..., :1]).long()",
        NUMBERS,
    ),
    mutant(
        "now is as long ago as usually",
        EVIDENCE,
        "of_history(NOW_DECAY ** age_BN.float() * counts_BN, NOW_PRIOR)",
        "of_history(DECAY ** age_BN.float() * counts_BN, NOW_PRIOR)",
        NUMBERS,
    ),
    mutant(
        "own click is taken out at every age",
        EVIDENCE,
        "STEP_DECAY ** age_BN.float() * (age_BN < STEPS) * mask",
        "STEP_DECAY ** age_BN.float() * mask",
        NUMBERS,
    ),
    mutant(
        "own click counts in training only as in evaluation",
        EVIDENCE,
        "batch.labels > 0 if own else",
        "batch.labels > 0 if not own else",
        NUMBERS,
    ),
    mutant(
        "history decays the other way",
        EVIDENCE,
        "age = (once.flip(1).cumsum(1).flip(1) - 1).clamp(min=0)",
        "age = (once.cumsum(1) - 1).clamp(min=0)",
        NUMBERS,
    ),
    mutant(
        "an item that follows itself counts twice",
        EVIDENCE,
        "once[:, :-1] &= (items[:, :-1] != items[:, 1:]) | ~mask[:, 1:]",
        "pass",
        NUMBERS,
    ),
    mutant(
        "followers reversed",
        NEIGHBOURS,
        "pairs = (item[before[same]], item[same])",
        "pairs = (item[same], item[before[same]])",
        COUNTS,
    ),
    mutant(
        "followers of another user",
        NEIGHBOURS,
        "same = (before >= 0) & (user[np.maximum(before, 0)] == user)",
        "same = before >= 0",
        COUNTS,
    ),
    mutant(
        "followers at every step alike",
        NEIGHBOURS,
        "step_decay ** (step - 1)",
        "step_decay ** 0",
        COUNTS,
    ),
    mutant(
        "the farthest neighbours are kept",
        NEIGHBOURS,
        "np.lexsort((other[found], -by[found]))",
        "np.lexsort((other[found], by[found]))",
        COUNTS,
    ),
    mutant(
        "neighbours by number, not by similarity",
        EVIDENCE,
        "keep_nearest(self.near, self.near_users, row, other, common, similarity)",
        "keep_nearest(self.near, self.near_users, row, other, common, common)",
        COUNTS,
    ),
    mutant(
        "a search and a recommendation of one moment are two clicks",
        NEIGHBOURS,
        "kept = in_histories(user, time, item, task)",
        "kept = user >= 0",
        COUNTS,
    ),
    mutant(
        "clicks of one moment follow each other",
        NEIGHBOURS,
        "np.searchsorted(moment, moment)",
        "np.arange(len(moment))",
        COUNTS,
    ),
    mutant(
        "idf is 1",
        EVIDENCE,
        "self.idf.copy_((1 + (tables.num_items - holding + 0.5) / (holding + 0.5)).log())",
        "self.idf.fill_(1.0)",
        COUNTS,
    ),
    mutant(
        "idf counts a word twice",
        EVIDENCE,
        "holding += torch.bincount(tokens[first_of_each(tokens)], minlength=len(holding))",
        "holding += torch.bincount(tokens.flatten(), minlength=len(holding))",
        COUNTS,
    ),
    mutant(
        "similarity of the best word, not the mean",
        EVIDENCE,
        "4 * weighted(words_BNC, mean_BN)",
        "4 * (words_BNC * real_BN1).amax(1)",
        NUMBERS,
    ),
    mutant(
        "taste of the oldest",
        EVIDENCE,
        "newest_BN = (weight_BN == 1.0).float()",
        "newest_BN = (weight_BN > 0).float()",
        NUMBERS,
    ),
    mutant(
        "near without popularity",
        EVIDENCE,
        "near_BNC = common_BNC / (norm_BNC + SHRINK)",
        "near_BNC = common_BNC / SHRINK",
        NUMBERS,
    ),
    mutant(
        "after without popularity",
        EVIDENCE,
        "after_BNC = after_BNC / norm_BNC",
        "after_BNC = after_BNC / SHRINK",
        NUMBERS,
    ),
    mutant(
        "query's words with repetitions",
        EVIDENCE,
        "value_BQ = self.idf[terms_BQ] * first_of_each(terms_BQ)",
        "value_BQ = self.idf[terms_BQ]",
        NUMBERS,
    ),
    mutant(
        "a category's key is its parent's",
        EVIDENCE,
        "text = category_query(list(path))",
        "text = category_query(list(path[:-1]))",
        NUMBERS,
    ),
    mutant(
        "last category is the first",
        EVIDENCE,
        "below = torch.cat([levels_BCT[..., 1:], torch.zeros_like(levels_BCT[..., :1])], -1)",
        "below = torch.cat([torch.zeros_like(levels_BCT[..., :1]), levels_BCT[..., :-1]], -1)",
        NUMBERS,
    ),
    mutant(
        "own click stays among the clicks of a query's words",
        QUERY_WORDS,
        "clicks_BQX = (clicks_BQX - mine_B1X.float()).clamp(min=0)",
        "clicks_BQX = clicks_BQX.clamp(min=0)",
        NUMBERS,
    ),
    mutant(
        "own click stays among a query word's searches",
        QUERY_WORDS,
        "asked_BQ1, held_B1X = (asked_BQ1 - 1).clamp(min=0), held_B1X - mine_B1X.float()",
        "asked_BQ1, held_B1X = asked_BQ1, held_B1X - mine_B1X.float()",
        NUMBERS,
    ),
    mutant(
        "own click decides which words are near",
        QUERY_WORDS,
        "clicks_BQX = clicks_BQX * stays_BQX",
        "clicks_BQX = clicks_BQX + 0 * stays_BQX",
        NUMBERS,
    ),
    mutant(
        "a word of the query counts twice",
        QUERY_WORDS,
        "return terms * first_of_each(terms)",
        "return terms",
        NUMBERS,
    ),
    mutant(
        "clicks without a query count as searches",
        QUERY_WORDS,
        "searched = (clicks.task == SRC) & (clicks.query >= 0)",
        "searched = clicks.query >= -1",
        NUMBERS,
    ),
    mutant(
        "evidence reads the other task's output",
        EVIDENCE,
        "both_BC2.gather(2, task_B[:, None, None]",
        "both_BC2.gather(2, 1 - task_B[:, None, None]",
        EVIDENCE_LOSS,
    ),
    mutant(
        "evidence without its network",
        EVIDENCE,
        "self.linear(features_BCF) + self.out(F.gelu(self.hidden(features_BCF)))",
        "self.linear(features_BCF) + 0 * self.out(F.gelu(self.hidden(features_BCF)))",
        EVIDENCE_LOSS,
    ),
    mutant(
        "evidence is not added to the answer",
        GENSR,
        "return scores_BC + parts.beside_BC, parts.cf_BCD",
        "return scores_BC, parts.cf_BCD",
        EVIDENCE_LOSS,
    ),
    mutant(
        "training sees the clicks as evaluation does",
        GENSR,
        "seen = self.seen(batch, own=True)",
        "seen = self.seen(batch)",
        EVIDENCE_LOSS,
    ),
    mutant(
        "sign of the correction",
        GENSR,
        "scores_BC = scores_BC - self._drawn_more_often(batch, seen)",
        "scores_BC = scores_BC + self._drawn_more_often(batch, seen)",
        EVIDENCE_LOSS,
    ),
    mutant(
        "share of the mined counts the click",
        GENSR,
        "share = self.settings.mined_negatives / max(batch.candidates.shape[1] - 1, 1)",
        "share = self.settings.mined_negatives / max(batch.candidates.shape[1], 1)",
        EVIDENCE_LOSS,
    ),
    mutant(
        "correction without the catalogue's size",
        MINING,
        "(1 - share * finds_B1 + share * num_items * by_near_BC).log()",
        "(1 - share * finds_B1 + share * by_near_BC).log()",
        CORRECTION,
    ),
    mutant(
        "uniform share where mining finds nothing",
        MINING,
        "(1 - share * finds_B1 +",
        "(1 - share +",
        CORRECTION,
    ),
    mutant(
        "correction with all neighbours that could be",
        MINING,
        "length_BN = (evidence.near[batch.history_items] < num_items).sum(-1)",
        "length_BN = (evidence.near[batch.history_items] <= num_items).sum(-1)",
        CORRECTION,
    ),
    mutant(
        "correction of a category as of neighbours",
        MINING,
        "by_near_BC = torch.where(known_B[:, None], by_category_BC, by_near_BC)",
        "by_near_BC = torch.where(known_B[:, None], by_near_BC, by_near_BC)",
        CORRECTION,
    ),
    mutant(
        "what the user clicked is mined",
        MINING,
        "taken |= mine.clicked[place] == wanted",
        "taken |= mine.clicked[place] < 0",
        ALLOWED,
    ),
    mutant(
        "the history is mined",
        MINING,
        "(found_BH[..., None] == known_BN[:, None]).any(-1) | (found_BH < 0)",
        "(found_BH < 0)",
        ALLOWED,
    ),
    mutant(
        "the clicked candidate is exchanged",
        MINING,
        "torch.where(taken | ~is_negative_BH, drawn_BH, found_BH)",
        "torch.where(taken, drawn_BH, found_BH)",
        ALLOWED,
    ),
    mutant(
        "the clicked item is its own negative",
        MINING,
        "taken |= found_BH == batch.clicked[:, None]",
        "pass",
        ALLOWED,
    ),
    mutant(
        "all draws of an event are one",
        MINING,
        "mixed(mixed(batch.event_id)[:, None] ^ drawn_BH)",
        "mixed(mixed(batch.event_id)[:, None] ^ drawn_BH * 0)",
        ALLOWED,
    ),
    mutant(
        "older items are mined more often",
        MINING,
        "upto_BN = weight_BN.cumsum(1)",
        "upto_BN = (weight_BN > 0).float().cumsum(1)",
        OFTEN,
    ),
    mutant(
        "the last item of a category is never mined",
        MINING,
        ".minimum(size_B1 - 1)",
        ".minimum(size_B1 - 2)",
        OFTEN,
    ),
    mutant(
        "the first neighbour only",
        MINING,
        "which_BH = (_unit(mixed(bits_BH)) * size_BH).long()",
        "which_BH = (_unit(mixed(bits_BH)) * 0).long()",
        OFTEN,
    ),
    mutant(
        "items of another category",
        MINING,
        "place_BH = mine.categories.start[place_B][:, None] + which_BH",
        "place_BH = which_BH",
        ALLOWED,
    ),
]

# ---- losses ------------------------------------------------------------------------------------------------

LOSS = [
    mutant(
        "Eq. 9 as a sum over candidates",
        LOSSES,
        "return weighted_mean(losses_BC.mean(1), weights_B)",
        "return weighted_mean(losses_BC.sum(1), weights_B)",
        f"{MODEL}::test_answer_loss_is_the_negative_log_likelihood_of_the_answer",
    ),
    mutant(
        "weights divide, too",
        LOSSES,
        "return (values_B * weights_B).mean()",
        "return (values_B * weights_B).sum() / weights_B.sum()",
        f"{MODEL}::test_answer_loss_is_the_negative_log_likelihood_of_the_answer",
    ),
    mutant(
        "listwise over events",
        LOSSES,
        "scores_BC.float().log_softmax(1)",
        "scores_BC.float().log_softmax(0)",
        DECODER,
    ),
    mutant(
        "τ multiplies",
        LOSSES,
        "(queries @ keys.T / temperature)",
        "(queries @ keys.T * temperature)",
        f"{MODEL}::test_contrastive_loss_equals_a_double_loop_without_same_user_negatives",
    ),
    mutant(
        "Eq. 10 in one direction",
        LOSSES,
        "return 0.5 * (info_nce(cf_BD, all_sem) + info_nce(sem_BD, all_cf))",
        "return info_nce(cf_BD, all_sem)",
        f"{MODEL}::test_contrastive_loss_equals_a_double_loop_without_same_user_negatives",
    ),
    mutant(
        "Eq. 10 without its half",
        LOSSES,
        "return 0.5 * (info_nce(",
        "return (info_nce(",
        f"{MODEL}::test_contrastive_loss_equals_a_double_loop_without_same_user_negatives",
    ),
    mutant(
        "a user's own rows are negatives",
        LOSSES,
        "hidden = (users_B[:, None] == all_users[None, :]) & (users_B[:, None] >= 0)",
        "hidden = (users_B[:, None] == all_users[None, :]) & (users_B[:, None] >= 1 << 40)",
        f"{MODEL}::test_contrastive_loss_equals_a_double_loop_without_same_user_negatives",
    ),
    mutant(
        "unknown users are one user",
        LOSSES,
        "hidden = (users_B[:, None] == all_users[None, :]) & (users_B[:, None] >= 0)",
        "hidden = users_B[:, None] == all_users[None, :]",
        f"{MODEL}::test_contrastive_loss_equals_a_double_loop_without_same_user_negatives",
    ),
    mutant(
        "rows without history are negatives",
        LOSSES,
        "    hidden = hidden | (all_counted == 0)[None, :]\n",
        "",
        f"{MODEL}::test_contrastive_loss_leaves_out_rows_without_history_as_a_double_loop_does",
    ),
    mutant(
        "rows without history have a loss",
        LOSSES,
        "return losses_B.masked_fill(~counted_B, 0.0).mean()",
        "return losses_B.mean()",
        f"{MODEL}::test_contrastive_loss_leaves_out_rows_without_history_as_a_double_loop_does",
    ),
    mutant(
        "views are not normalised",
        LOSSES,
        "cf_BD, sem_BD = F.normalize(cf_BD.float(), dim=1), F.normalize(sem_BD.float(), dim=1)",
        "cf_BD, sem_BD = cf_BD.float(), sem_BD.float()",
        f"{MODEL}::test_contrastive_loss_equals_a_double_loop_without_same_user_negatives",
    ),
    mutant(
        "gathered rows without their offset",
        LOSSES,
        "own = torch.arange(len(users_B), device=users_B.device) + offset",
        "own = torch.arange(len(users_B), device=users_B.device)",
        f"{MODEL}::test_contrastive_loss_gathers_who_has_a_history",
    ),
]

# ---- metrics -----------------------------------------------------------------------------------------------

METRIC = [
    mutant("ranks begin at 0", RANKS, "return 1.0 + greater_BC.sum(1)", "return greater_BC.sum(1)", METRICS),
    mutant(
        "ties at the best place",
        RANKS,
        "+ (num_tied_B - 1).double() / 2, num_tied_B",
        "+ 0 * num_tied_B, num_tied_B",
        METRICS,
    ),
    mutant(
        "ties count as greater",
        RANKS,
        "~nan_BC, scores_BC > score_B1)",
        "~nan_BC, scores_BC >= score_B1)",
        METRICS,
    ),
    mutant(
        "NaN ranks first",
        RANKS,
        "greater_BC = torch.where(nan_B1, ~nan_BC, scores_BC > score_B1)",
        "greater_BC = scores_BC > score_B1",
        METRICS,
    ),
    mutant("the negative is ranked", RANKS, "labels_BC.argmax(dim=1", "labels_BC.argmin(dim=1", METRICS),
    mutant(
        "ndcg of another logarithm",
        RANKS,
        "1.0 / torch.log2(1.0 + place)",
        "1.0 / torch.log(1.0 + place)",
        METRICS,
    ),
    mutant("ndcg one place off", RANKS, "torch.log2(1.0 + place)", "torch.log2(2.0 + place)", METRICS),
    mutant("mrr@10 is mrr@9", RANKS, "reciprocal[:10],", "reciprocal[:9],", METRICS),
    mutant("cutoffs of 5, 10, 50", RANKS, "CUTOFFS = (5, 10, 20)", "CUTOFFS = (5, 10, 50)", METRICS),
    mutant(
        "a missed item has a reciprocal rank",
        RANKS,
        "return torch.where(missed[:, None], 0.0, values)",
        "return values",
        METRICS,
    ),
    mutant("tie rate counts every event", RANKS, "(num_tied > 1)", "(num_tied > 0)", METRICS),
    mutant("interval of 90 %", BOOTSTRAP, "[0.025, 0.975]", "[0.05, 0.95]", METRICS, PAIRED),
    mutant(
        "the bootstrap resamples events",
        BOOTSTRAP,
        "_, place = np.unique(users, return_inverse=True)",
        "place = np.arange(len(users))",
        METRICS,
        PAIRED,
    ),
    mutant(
        "a − b",
        BOOTSTRAP,
        "np.asarray(b, dtype=np.float64) - np.asarray(a, dtype=np.float64)",
        "np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64)",
        PAIRED,
    ),
    mutant(
        "one-sided p-value",
        BOOTSTRAP,
        "2 * (int(smaller[i]) + 1)",
        "(int(smaller[i]) + 1)",
        METRICS,
    ),
    mutant(
        "a sample draws each user once",
        BOOTSTRAP,
        "draws = generator.integers(num_users, size=(num_resamples, num_users))",
        "draws = np.tile(np.arange(num_users), (num_resamples, 1))",
        METRICS,
    ),
    mutant(
        "fillers are evaluated",
        RANKING,
        "return ranks.take((batch.event_id >= 0).numpy())",
        "return ranks.take((batch.event_id >= -1).numpy())",
        EVALUATE,
        DATA,
    ),
    mutant(
        "mean over tasks leaves one out",
        RANKING,
        'means["mean"] = torch.stack(list(means.values())).mean(0)',
        'means["mean"] = list(means.values())[0]',
        EVALUATE,
    ),
    mutant(
        "tasks swapped in reports",
        RANKING,
        "name: ranks.of_task(task).metric_values().mean(0)",
        "name: ranks.of_task(1 - task).metric_values().mean(0)",
        EVALUATE,
    ),
]

# ---- optimizer and schedule --------------------------------------------------------------------------------

TRAINING = [
    mutant("vectors decay", OPTIMIZER, "parameter.ndim >= 2 and", "parameter.ndim >= 1 and", STEPS),
    mutant(
        "T5's position biases decay",
        OPTIMIZER,
        "and not any(table in name for table in UNDECAYED_TABLES)",
        "",
        STEPS,
    ),
    mutant(
        "nothing decays",
        OPTIMIZER,
        '"weight_decay": config.weight_decay}',
        '"weight_decay": 0.0}',
        STEPS,
    ),
    mutant("β2 of a default", OPTIMIZER, "betas=(0.9, config.beta2)", "betas=(0.9, 0.999)", STEPS),
    mutant("β1 of 0.8", OPTIMIZER, "betas=(0.9, config.beta2)", "betas=(0.8, config.beta2)", STEPS),
    mutant("the rate of the start stays", OPTIMIZER, '        group["lr"] = lr\n', "        pass\n", STEPS),
    mutant(
        "clipped at twice the norm",
        STEP,
        "clip_grad_norm_(model.parameters(), grad_clip)",
        "clip_grad_norm_(model.parameters(), 2 * grad_clip)",
        STEPS,
    ),
    mutant("gradients pile up", STEP, "        optimizer.zero_grad()\n", "", STEPS),
    mutant(
        "warm-up begins at 0",
        SCHEDULE,
        "return (step + 1) / self.warmup_steps",
        "return step / self.warmup_steps",
        PLAN,
    ),
    mutant(
        "no decay",
        SCHEDULE,
        "return (self.num_steps - step) / (self.num_steps - self.warmup_steps)",
        "return 1.0",
        PLAN,
    ),
    mutant(
        "decay ends a step early",
        SCHEDULE,
        "return (self.num_steps - step) / (self.num_steps - self.warmup_steps)",
        "return (self.num_steps - step - 1) / (self.num_steps - self.warmup_steps)",
        PLAN,
    ),
    mutant(
        "warm-up longer than the run",
        SCHEDULE,
        "warmup_steps=min(optim.warmup_steps, num_steps // 2)",
        "warmup_steps=optim.warmup_steps",
        PLAN,
    ),
    mutant(
        "accumulation forgets the ranks",
        SCHEDULE,
        "per_pass = optim.micro_batch_size * world_size",
        "per_pass = optim.micro_batch_size",
        PLAN,
    ),
    mutant(
        "epochs rounded down",
        SCHEDULE,
        "max(1, round(run.max_epochs * steps_per_epoch))",
        "round(run.max_epochs * steps_per_epoch)",
        PLAN,
    ),
    mutant("two validations at the end", SCHEDULE, "and 2 * left >= self.validate_every_steps", "", PLAN),
    mutant(
        "no validation at the end",
        SCHEDULE,
        "return left == 0 or (done",
        "return (done",
        PLAN,
    ),
    mutant(
        "no checkpoint of the last step",
        SCHEDULE,
        "return done % self.checkpoint_every_steps == 0 or done == self.num_steps",
        "return done % self.checkpoint_every_steps == 0",
        PLAN,
    ),
    mutant(
        "no log of the last step",
        SCHEDULE,
        "return done % self.log_every_steps == 0 or done == self.num_steps",
        "return done % self.log_every_steps == 0",
        PLAN,
    ),
    mutant("chance counts rank 0", SCHEDULE, "1 / math.log2(rank + 1)", "1 / math.log2(rank + 2)", PLAN),
    mutant("above chance from the mean on", SCHEDULE, "NUM_SIGMAS = 3.0", "NUM_SIGMAS = 0.0", PLAN),
]

# ---- negatives, histories, split ---------------------------------------------------------------------------

EVENTS = [
    mutant(
        "the clicked item is a negative",
        SAMPLER,
        "taken = np.concatenate([positives[None], np.where(",
        "taken = np.concatenate([np.where(",
        SAMPLING,
        DATA,
    ),
    mutant(
        "history items are negatives",
        SAMPLER,
        "np.where(history_mask, history, -1).T",
        "np.where(history_mask, -1, -1).T",
        SAMPLING,
    ),
    mutant(
        "padding is in the history",
        SAMPLER,
        "np.where(history_mask, history, -1).T",
        "history.T",
        SAMPLING,
        DATA,
    ),
    mutant(
        "negatives do not change with the epoch",
        SAMPLER,
        "^ mix64(epochs, derive_seed(self.seed, 2))",
        "",
        DATA,
    ),
    mutant(
        "negatives do not change with the seed",
        SAMPLER,
        "keys = mix64(event_ids, derive_seed(self.seed, 1)) ^ mix64(epochs, derive_seed(self.seed, 2))",
        "keys = mix64(event_ids, 1) ^ mix64(epochs, 2)",
        SAMPLING,
        DATA,
    ),
    mutant(
        "negatives repeat",
        SAMPLER,
        "bad[slot] |= (by_slot[:slot] == by_slot[slot]).any(axis=0)",
        "pass",
        SAMPLING,
        DATA,
    ),
    mutant(
        "collisions are drawn again alike",
        SAMPLER,
        "draws[columns] + attempt * self.num_negatives",
        "draws[columns]",
        SAMPLING,
        DATA,
    ),
    mutant(
        "popularity forgets α",
        SAMPLER,
        "(clicks.astype(np.float64) + 1.0) ** alpha",
        "(clicks.astype(np.float64) + 1.0) ** 0.75",
        DATA,
        SAMPLING,
    ),
    mutant(
        "popularity is uniform",
        SAMPLER,
        '"popularity": (0.0, 1.0),',
        '"popularity": (0.0, 0.0),',
        DATA,
    ),
    mutant(
        "a mixture without popularity",
        SAMPLER,
        "self.popularity_share = popularity / (1 - self.impressions_share) if popularity else 0.0",
        "self.popularity_share = 0.0",
        SAMPLING,
    ),
    mutant(
        "impressions that were clicked are negatives",
        SAMPLER,
        "            usable &= impressions != items[:, None]\n",
        "            pass\n",
        SAMPLING,
    ),
    mutant(
        "folds of other clicks",
        STREAM,
        "click_fold(",
        "1 - click_fold(",
        DATA,
    ),
    mutant(
        "the clicked item stands first",
        EVAL_STREAM,
        "place = uniform_below(mix64(rows.event_id, 32), candidates.shape[1])",
        "place = np.zeros(len(rows.event_id), np.int64)",
        DATA,
        EVALUATE,
    ),
    mutant(
        "stored negatives hold clicked items",
        STORED,
        "wanted[clicked.contains(user[open_rows, None].astype(np.int64) * num_items + wanted)] = -1",
        "pass",
        DATA_STEPS,
    ),
    mutant(
        "stored negatives repeat",
        STORED,
        "drawn[open_rows] = _without_repeats(wanted)",
        "drawn[open_rows] = wanted",
        DATA_STEPS,
    ),
    mutant(
        "stored negatives by position",
        STORED,
        "row_seed = mix64(event_id, seed)",
        "row_seed = mix64(np.arange(len(event_id)), seed)",
        DATA_STEPS,
        DRAWS,
    ),
    mutant(
        "histories of the same moment",
        HISTORIES,
        'end = before[run_of_time[np.searchsorted(run_of_time, rows, side="right") - 1]]',
        "end = before",
        DATA_STEPS,
    ),
    mutant(
        "the oldest clicks are kept",
        HISTORIES,
        "start = np.maximum(user_start, end - history_max)\n    return start, (end - start)",
        "start = user_start\n    return start, np.minimum(end - start, history_max)",
        DATA_STEPS,
    ),
    mutant(
        "histories cross users",
        HISTORIES,
        "start = np.maximum(user_start, end - history_max)",
        "start = np.maximum(0, end - history_max)",
        DATA_STEPS,
    ),
    mutant(
        "a double click is a recommendation",
        HISTORIES,
        "task[tied] != SRC",
        "task[tied] == SRC",
        DATA_STEPS,
    ),
    mutant(
        "a click twice in a history",
        HISTORIES,
        "keep[order[~first_of_runs(group[order], item[order])]] = False",
        "pass",
        DATA_STEPS,
    ),
    mutant(
        "impressions repeat",
        HISTORIES,
        "order = order[first_of_runs(moment[order], item[order])]",
        "pass",
        REFERENCE,
    ),
    mutant(
        "midnight of Greenwich",
        SPLIT,
        "last_day = (last_time + offset) // DAY_MS",
        "last_day = last_time // DAY_MS",
        DATA_STEPS,
    ),
    mutant(
        "the offset's sign",
        SPLIT,
        "test_start = (last_day - test_days + 1) * DAY_MS - offset",
        "test_start = (last_day - test_days + 1) * DAY_MS + offset",
        DATA_STEPS,
    ),
    mutant(
        "the first millisecond of test is validation",
        SPLIT,
        "(time >= test_start)",
        "(time > test_start)",
        DATA_STEPS,
    ),
    mutant(
        "validation begins a moment late",
        SPLIT,
        "(time >= valid_start)",
        "(time > valid_start)",
        DATA_STEPS,
    ),
    mutant(
        "one day of validation too few",
        SPLIT,
        "return test_start - valid_days * DAY_MS, test_start",
        "return test_start - (valid_days - 1) * DAY_MS, test_start",
        DATA_STEPS,
    ),
    mutant(
        "test and validation swapped",
        SPLIT,
        "np.where(from_end == 0, TEST, np.where(from_end == 1, VALID, TRAIN))",
        "np.where(from_end == 0, VALID, np.where(from_end == 1, TEST, TRAIN))",
        DATA_STEPS,
    ),
    mutant(
        "short users are tested",
        SPLIT,
        "long_enough = (last - first)[user_group] >= 2",
        "long_enough = (last - first)[user_group] >= 1",
        DATA_STEPS,
    ),
    mutant(
        "leave one out by click, not by moment",
        SPLIT,
        "new_time[1:] |= time[1:] != time[:-1]",
        "new_time[1:] = True",
        DATA_STEPS,
    ),
]

# ---- other systems, and one that finds candidates for another ----------------------------------------------

SYSTEMS = [
    mutant(
        "attention to nothing is a mean",
        ATTENTION,
        "torch.finfo(torch.float32).min).softmax(-1) * seen",
        "torch.finfo(torch.float32).min).softmax(-1)",
        NOTHING_SEEN,
    ),
    mutant(
        "UniSAR's pairs the wrong way round",
        CONTRAST,
        "queries_BND[pairs_BN], items_BND[pairs_BN]",
        "items_BND[pairs_BN], queries_BND[pairs_BN]",
        UNISAR_PAIRS,
    ),
    mutant(
        "USER's words see padding",
        USER,
        "masked_softmax(query @ key.transpose(2, 3), mask_BN[:, None, None])",
        "masked_softmax(query @ key.transpose(2, 3), torch.ones_like(mask_BN)[:, None, None])",
        USER_TESTS,
    ),
    mutant(
        "a retriever answers for every task",
        RETRIEVER,
        "if parsed.task not in self.scorer.model.tasks:",
        "if parsed.task < 0:",
        RETRIEVERS,
    ),
    mutant(
        "an evaluation's retriever may propose what is left out",
        RETRIEVER,
        "found[place] = _best_known(scores_I, num_items, exclude[place])",
        "found[place] = _best_known(scores_I, num_items, ())",
        RETRIEVERS,
    ),
    mutant(
        "a counted retriever fills up",
        RETRIEVER,
        "scores_I[scores_I == scores_I.min()] = -torch.inf",
        "scores_I[scores_I > scores_I.max()] = -torch.inf",
        RETRIEVERS,
    ),
    mutant(
        "a retriever that has stopped half-way",
        RETRIEVER,
        'if status not in (None, "finished"):',
        "if status in ():",
        RETRIEVERS,
    ),
    mutant(
        "a retriever of as many other items",
        RETRIEVER,
        "if list(retriever.scorer.item_ids) != list(item_ids):",
        "if len(retriever.scorer.item_ids) != len(item_ids):",
        RETRIEVERS,
    ),
    mutant(
        "tasks begin in the order in which they come",
        POOL,
        "(place, next(self._order), run, future)",
        "(0, next(self._order), run, future)",
        f"{JOBS}::test_results_are_those_of_their_tasks_and_the_order_is_that_of_places",
    ),
    mutant("each of several runs has all cores", POOL, "max(1, cores // jobs)", "max(1, cores)", CORES),
    mutant(
        "two runs on one GPU",
        POOL,
        '"CUDA_VISIBLE_DEVICES": devices[job]',
        '"CUDA_VISIBLE_DEVICES": devices[0]',
        f"{JOBS}::test_no_gpu_has_two_jobs",
    ),
    mutant(
        "the time left is that of one job",
        POOL,
        "running_s) / self.jobs)",
        "running_s))",
        f"{JOBS}::test_the_time_left_counts_jobs",
    ),
    mutant(
        "a child in its parent's session",
        FORKED,
        "    os.setsid()",
        "    os.getsid(0)",
        OWN_PROCESS,
    ),
    mutant(
        "a child with the environment of the process that it is forked from",
        FORKED,
        "os.environ.update(environment)",
        "os.environ.update()",
        OWN_PROCESS,
    ),
    mutant(
        "a child leaves out what is due at its end",
        FORKED,
        "atexit._run_exitfuncs()",
        "atexit._ncallbacks()",
        OWN_PROCESS,
    ),
    mutant(
        "a forked child with the threads of the process that forks",
        FORKED,
        "torch.set_num_threads(int(threads))",
        "torch.get_num_threads()",
        CORES,
    ),
]

MUTANTS = [*NINE, *MODELS, *COUNTED, *LOSS, *METRIC, *TRAINING, *EVENTS, *SYSTEMS]
