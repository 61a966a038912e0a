import { Migration } from '@mikro-orm/migrations'

/**
 * The first schema.
 *
 * Tables that grow with time (health_reports, decisions, audit_events) are partitioned by day, so that retention drops
 * partitions instead of deleting rows; `db/partitions.ts` makes them ahead of time and the default partition catches
 * what it missed.
 */
export class FirstSchema extends Migration {
  override async up(): Promise<void> {
    this.addSql(`
      create table devices (
        id text primary key,
        type text not null,
        os text not null,
        os_version text not null,
        labels jsonb not null,
        status text not null check (status in ('pending', 'active', 'quarantined', 'revoked')),
        status_reason text not null default '',
        spiffe_id text not null unique,
        public_key_sha256 text not null,
        enrolled_at timestamptz not null,
        updated_at timestamptz not null
      )`)
    this.addSql('create index devices_status on devices (status)')
    // Rewritten by every heartbeat: room on each page keeps the new version beside the old one (heap-only updates).
    this.addSql(`
      create table device_postures (
        device_id text primary key references devices (id) on delete cascade,
        posture jsonb not null,
        failing jsonb not null,
        measured_at timestamptz not null,
        received_at timestamptz not null
      ) with (fillfactor = 70)`)
    this.addSql(`
      create table health_reports (
        received_at timestamptz not null,
        device_id text not null,
        sequence bigint not null,
        posture jsonb not null,
        measured_at timestamptz not null
      ) partition by range (received_at)`)
    this.addSql('create index health_reports_device on health_reports (device_id, received_at desc)')

    this.addSql(`
      create table enrollment_tokens (
        id text primary key,
        secret_hash bytea not null,
        uses_max int not null check (uses_max > 0),
        uses int not null default 0 check (uses between 0 and uses_max),
        expires_at timestamptz not null,
        revoked_at timestamptz,
        labels jsonb not null,
        device_type text,
        device_id text,
        created_by text not null,
        created_at timestamptz not null
      )`)
    this.addSql(`
      create table token_redemptions (
        token_id text not null references enrollment_tokens (id),
        public_key_sha256 text not null,
        device_id text not null,
        source_address text not null,
        redeemed_at timestamptz not null,
        primary key (token_id, public_key_sha256)
      )`)
    this.addSql(`
      create table certificates (
        serial text primary key,
        subject_kind text not null check (subject_kind in ('device', 'operator', 'service')),
        subject_id text not null,
        public_key_sha256 text not null,
        fingerprint_sha256 text,
        not_before timestamptz not null,
        not_after timestamptz not null,
        revoked_at timestamptz,
        revocation_reason text,
        created_at timestamptz not null
      )`)
    this.addSql('create index certificates_subject on certificates (subject_kind, subject_id)')
    this.addSql('create index certificates_revoked on certificates (not_after) where revoked_at is not null')
    this.addSql(`
      create table authorities (
        id int primary key check (id = 1),
        trust_domain text not null,
        root_pem text not null,
        root_key_pem text not null,
        intermediate_pem text not null,
        intermediate_key_pem text not null,
        created_at timestamptz not null
      )`)

    this.addSql(`
      create table users (
        id text primary key,
        email text not null,
        name text not null,
        role text not null,
        status text not null check (status in ('active', 'disabled')),
        created_at timestamptz not null
      )`)
    this.addSql('create unique index users_email on users (lower(email))')
    this.addSql(`
      create table services (
        id text primary key,
        name text not null,
        labels jsonb not null,
        owner text not null,
        status text not null check (status in ('active', 'disabled')),
        created_at timestamptz not null
      )`)
    this.addSql(`
      create table role_grants (
        role text not null,
        service text not null,
        actions jsonb not null,
        created_at timestamptz not null,
        primary key (role, service)
      )`)
    this.addSql(`
      create table policy_data (
        id int primary key check (id = 1),
        requirements jsonb not null,
        hours jsonb,
        updated_at timestamptz not null
      )`)
    this.addSql(`
      insert into policy_data (id, requirements, hours, updated_at) values (1,
        '{"patches_current": true, "antivirus_enabled": true, "disk_encrypted": true, "firewall_enabled": false,
          "cpu_percent_max": 90, "memory_percent_max": 90, "disk_percent_max": null}',
        '{"timezone": "UTC", "days": ["mon", "tue", "wed", "thu", "fri"], "start_minute": 480, "end_minute": 1080,
          "exempt_roles": ["admin"]}',
        now())`)
    this.addSql(`insert into role_grants (role, service, actions, created_at) values ('admin', '*', '["*"]', now())`)

    this.addSql(`
      create table connections (
        id uuid primary key,
        device_id text not null,
        user_id text not null,
        service_id text not null,
        action text not null,
        instance_id text not null,
        status text not null check (status in ('active', 'revoked', 'closed')),
        granted_at timestamptz not null,
        ended_at timestamptz,
        end_reasons jsonb,
        decision_id text not null
      )`)
    this.addSql('create index connections_device on connections (device_id, granted_at desc)')
    this.addSql('create index connections_granted on connections (granted_at desc, id desc)')
    this.addSql(`create index connections_open on connections (instance_id) where status = 'active'`)
    this.addSql(`
      create table decisions (
        at timestamptz not null,
        id uuid not null,
        device_id text not null,
        caller text not null,
        method text not null,
        source_address text not null,
        instance_id text not null,
        policy_revision text not null,
        latency_us int not null,
        questions jsonb not null
      ) partition by range (at)`)
    this.addSql('create index decisions_id on decisions (id)')
    this.addSql('create index decisions_at on decisions (at desc, id desc)')
    this.addSql('create index decisions_device on decisions (device_id, at desc)')
    this.addSql(`
      create table audit_events (
        at timestamptz not null,
        id uuid not null,
        actor text not null,
        method text not null,
        target text not null,
        source_address text not null,
        code text not null,
        reason text not null,
        detail jsonb not null,
        instance_id text not null
      ) partition by range (at)`)
    this.addSql('create index audit_events_at on audit_events (at desc, id desc)')
    this.addSql('create index audit_events_target on audit_events (target, at desc)')
    for (const table of ['health_reports', 'decisions', 'audit_events']) {
      this.addSql(`create table ${table}_default partition of ${table} default`)
    }
    this.addSql(`
      create function refuse_change() returns trigger language plpgsql as $$
      begin
        raise exception 'rows of % are never changed or removed', tg_table_name using errcode = 'insufficient_privilege';
      end $$`)
    for (const table of ['decisions', 'audit_events']) {
      this.addSql(`
        create trigger ${table}_append_only before update or delete on ${table}
        for each row execute function refuse_change()`)
    }
    this.addSql(`
      create table instances (
        id text primary key,
        started_at timestamptz not null,
        seen_at timestamptz not null
      )`)
  }

  override async down(): Promise<void> {
    this.addSql(`
      drop table instances, audit_events, decisions, connections, policy_data, role_grants, services, users, authorities,
        certificates, token_redemptions, enrollment_tokens, health_reports, device_postures, devices`)
    this.addSql('drop function refuse_change')
  }
}
