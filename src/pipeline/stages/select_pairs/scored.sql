-- What all strategies begin with: the answers that take part, with what they are worth.
--
-- $truncated: 'drop' leaves answers out that were cut off at max_new_tokens.
-- $near_equal: 'drop' keeps of answers that differ in case, spaces and punctuation only the best.
-- $length_penalty: what an answer is worth less for each of its tokens.
-- $seed: decides what is drawn at random.
with scored as (
    select
        r.prompt_id,
        r.candidate,
        r.reward,
        r.reward - $length_penalty * c.tokens as worth,
        c.tokens,
        c.text_digest,
        coalesce(isnan(r.reward) or abs(r.reward) = 'infinity'::float, true) as is_faulty,
        $truncated = 'keep' or c.finish = 'stop' as takes_part
    from {rewards} r
    join (
        select
            prompt_id,
            candidate,
            finish,
            array_length(token_ids) as tokens,
            md5(case
                when $near_equal = 'drop' then trim(regexp_replace(lower(text), '[[:punct:][:space:]]+', ' ', 'g'))
                else text
            end) as text_digest
        from {candidates}
    ) c on c.prompt_id = r.prompt_id and c.candidate = r.candidate
),
distinct_answers as (
    select
        *,
        row_number() over (partition by prompt_id, text_digest order by worth desc, candidate) as of_equal
    from scored
    where takes_part
),
ranked as (
    select
        prompt_id,
        candidate,
        reward,
        worth,
        tokens,
        text_digest,
        row_number() over (partition by prompt_id order by worth desc, candidate) as from_best,
        row_number() over (partition by prompt_id order by worth, candidate) as from_worst,
        row_number() over (partition by prompt_id order by md5(concat($seed, prompt_id, candidate))) as drawn
    from distinct_answers
    where $near_equal = 'keep' or of_equal = 1
),
