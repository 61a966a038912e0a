import { Migration } from '@mikro-orm/migrations'

/**
 * What lets a service run as a role that owns no table: partitions are made and dropped by functions of the owner.
 *
 * They do only what time brings about. A role that can call them, but does not own the tables, makes partitions of the
 * coming days, and drops days, or rows outside of any, that are older than the owner has laid down in `audit_retention`;
 * what time it is, the database says. Instances of the version before make and drop partitions themselves, as the owner.
 */
export class AuditPrivileges extends Migration {
  override async up(): Promise<void> {
    // How old audit has to be before anybody but the owner may have it dropped.
    this.addSql(`
      create table audit_retention (
        id int primary key check (id = 1),
        days_min int not null check (days_min > 0)
      )`)
    this.addSql('insert into audit_retention (id, days_min) values (1, 1)')

    /** @returns whether the caller need not be held back: it could do all this without the functions. */
    this.addSql(`
      create function owns_partitions(parent text) returns boolean language plpgsql stable strict as $$
      begin
        if parent not in ('health_reports', 'decisions', 'audit_events', 'audit_seals') then
          raise exception 'there are no days of %', parent using errcode = 'invalid_parameter_value';
        end if;
        return pg_has_role(session_user, (select relowner from pg_class where oid = parent::regclass), 'member');
      end $$`)

    // One instance at a time. Nobody waits for long behind a lock that these wait for: what was not done is done later.
    this.addSql(`
      create function make_day_partition(parent text, day date) returns boolean
      language plpgsql strict security definer set lock_timeout = '1s' as $$
      declare
        name text := parent || to_char(day, '_YYYYMMDD');
        today date := (now() at time zone 'UTC')::date;
      begin
        if not owns_partitions(parent) and day not between today - 1 and today + 8 then
          raise exception 'only partitions of the coming days are made' using errcode = 'insufficient_privilege';
        end if;
        perform pg_advisory_xact_lock(hashtext('edgemesh partitions'));
        if to_regclass(name) is null then
          execute format('create table %I partition of %I for values from (%L) to (%L)', name, parent,
            day::timestamp at time zone 'UTC', (day + 1)::timestamp at time zone 'UTC');
        end if;
        return true;
      exception when check_violation then
        -- Rows of that day already lie in the default partition: they stay there, whole and found as ever.
        return false;
      end $$`)
    this.addSql(`
      create function demand_expired(parent text, day date) returns void language plpgsql stable strict as $$
      declare
        today date := (now() at time zone 'UTC')::date;
        days int := (select days_min from audit_retention);
      begin
        -- The names of partitions have no era: 2026 before Christ is older, but would be 2026.
        if day not between date '2000-01-01' and date '9999-12-31' then
          raise exception 'there is no such day' using errcode = 'invalid_parameter_value';
        end if;
        if not owns_partitions(parent) and day >= today - days then
          raise exception 'what is younger than % days is not removed', days using errcode = 'insufficient_privilege';
        end if;
      end $$`)
    this.addSql(`
      create function drop_day_partition(parent text, day date) returns boolean
      language plpgsql strict security definer set lock_timeout = '1s' as $$
      declare
        name text := parent || to_char(day, '_YYYYMMDD');
      begin
        perform demand_expired(parent, day);
        perform pg_advisory_xact_lock(hashtext('edgemesh partitions'));
        if not exists (select from pg_inherits where inhrelid = to_regclass(name) and inhparent = parent::regclass) then
          return false;
        end if;
        execute format('drop table %I', name);
        return true;
      end $$`)
    // Rows that came when there was no partition for them, a few at a time.
    this.addSql(`
      create function remove_default_rows(parent text, before date, rows_max int) returns int
      language plpgsql strict security definer set lock_timeout = '1s' as $$
      declare
        name text := parent || '_default';
        guard text := parent || '_append_only';
        guarded boolean := exists (select from pg_trigger where tgrelid = name::regclass and tgname = guard);
        condition text := format('%I < %L', case parent when 'health_reports' then 'received_at' else 'at' end,
          before::timestamp at time zone 'UTC');
        found boolean;
        removed int;
      begin
        perform demand_expired(parent, before - 1);
        perform pg_advisory_xact_lock(hashtext('edgemesh partitions'));
        execute format('select exists (select from %I where %s)', name, condition) into found;
        if not found then
          return 0;
        end if;
        if guarded then
          execute format('alter table %I disable trigger %I', name, guard);
        end if;
        execute format('delete from %I where ctid in (select ctid from %I where %s limit %s)', name, name, condition,
          rows_max);
        get diagnostics removed = row_count;
        if guarded then
          execute format('alter table %I enable trigger %I', name, guard);
        end if;
        return removed;
      end $$`)
    // Whatever the caller has named likewise, temporary tables among it, is not looked at.
    this.addSql(`
      do $$
      declare
        name text;
      begin
        foreach name in array array['make_day_partition(text, date)', 'drop_day_partition(text, date)',
          'remove_default_rows(text, date, int)'] loop
          execute format('alter function %s set search_path = %I, pg_temp', name, current_schema());
          execute format('revoke execute on function %s from public', name);
        end loop;
      end $$`)
  }

  override async down(): Promise<void> {
    this.addSql('drop function remove_default_rows, drop_day_partition, make_day_partition, demand_expired')
    this.addSql('drop function owns_partitions')
    this.addSql('drop table audit_retention')
  }
}
