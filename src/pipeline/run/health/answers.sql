-- The k answers to each training prompt. The metrics of repeated text read 500 prompts, the first by
-- their hashes.
with answered as (
  select prompt_id, candidate, finish, token_ids, cast(cardinality(token_ids) as double) as tokens
  from {answers} where round = $round
), some as (
  select prompt_id from answered group by prompt_id order by prompt_id limit 500
), places as (
  select prompt_id, candidate, token_ids, unnest(range(1, cardinality(token_ids))) as i
  from answered where prompt_id in (select prompt_id from some)
), grams as (
  select prompt_id, candidate, token_ids[i] as a, token_ids[i + 1] as b, token_ids[i + 2] as c, token_ids[i + 3] as d
  from places
), twos as (
  select prompt_id, a, b, count(*) as times from grams group by prompt_id, a, b
), fours as (
  select prompt_id, candidate, a, b, c, d, count(*) as times from grams where d is not null
  group by prompt_id, candidate, a, b, c, d
), per_prompt as (
  select cast(count(*) as double) / sum(times) as distinct_2 from twos group by prompt_id
), per_answer as (
  select 1 - cast(count(*) as double) / sum(times) as repeated_4 from fours group by prompt_id, candidate
), before as (
  select avg(cast(cardinality(token_ids) as double)) as tokens from {answers}
  where round = (select min(round) from {answers})
)
select 'answer_tokens' as metric, avg(tokens) as value, count(*) as n from answered
union all
select 'length_growth', avg(a.tokens) / max(b.tokens), count(*) from answered a cross join before b
union all
select 'cut_off', avg(case when finish = 'length' then 1.0 else 0.0 end), count(*) from answered
union all
select 'distinct_2', avg(distinct_2), count(*) from per_prompt
union all
select 'repeated_4', avg(repeated_4), count(*) from per_answer
